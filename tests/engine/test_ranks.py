"""The number of ranks does not change what is learned."""

import json
import subprocess
import sys

import pytest
import torch

from tests.engine.tiny import command, environment, exported_weights, launch, losses, tiny_config, write_config

# Rounding differs between rank counts by about 1e-6; a routing decision closer than this could flip.
SAFE_MARGIN = 1e-5


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """An uninterrupted run on one rank, and the smallest gap between the last chosen and first rejected expert."""
    directory = tmp_path_factory.mktemp("ranks")
    config_file = write_config(directory / "one.json", tiny_config(directory, run_dir=str(directory / "one")))
    margins = directory / "margins.json"
    script = directory / "with_margins.py"
    script.write_text(MARGIN_PROBE.format(margins=str(margins), config=str(config_file)))
    subprocess.run([sys.executable, str(script)], cwd=directory, check=True, timeout=180)
    return directory, json.loads(margins.read_text())


MARGIN_PROBE = """
import json
from xtuner import ops, run
smallest, original = [], ops.topk_softmax
def topk_softmax(logits, k, *args):
    ordered = logits.detach().softmax(-1).sort(-1, descending=True).values
    smallest.append((ordered[:, k - 1] - ordered[:, k]).min().item())
    return original(logits, k, *args)
ops.topk_softmax = topk_softmax
code = run.main(["train", {config!r}])
assert code == 0 and smallest, "the router no longer goes through ops.topk_softmax: adapt this probe"
json.dump(min(smallest), open({margins!r}, "w"))
"""


def test_no_routing_decision_hangs_on_rounding(one_rank):
    assert one_rank[1] > SAFE_MARGIN


@pytest.mark.parametrize(("num_ranks", "launcher"), [(2, "torchrun"), (4, "--nproc")])
def test_same_losses_and_weights(one_rank, num_ranks, launcher):
    directory, _ = one_rank
    run_dir = directory / f"ranks{num_ranks}"
    config = tiny_config(directory, run_dir=str(run_dir), micro_batch_size=4 // num_ranks)
    config_file = write_config(directory / f"{num_ranks}.json", config)
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--standalone"]
        whole = [*torchrun, *command(config_file)[1:]]
        result = subprocess.run(whole, cwd=directory, env=environment(), capture_output=True, text=True, timeout=180)
    else:
        result = launch(config_file, "--nproc", str(num_ranks), cwd=directory)
    assert result.returncode == 0, result.stderr
    ours, theirs = torch.tensor(losses(run_dir)), torch.tensor(losses(directory / "one"))
    assert len(theirs) == 20
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    held_out = [torch.tensor(losses(d, "validation")) for d in (run_dir, directory / "one")]
    torch.testing.assert_close(*held_out, rtol=1e-5, atol=0)
    weights, expected = exported_weights(run_dir), exported_weights(directory / "one")
    assert weights.keys() == expected.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
    worst = max((weights[n] - expected[n]).abs().max().item() for n in weights)
    print(f"{num_ranks} ranks: loss rel {((ours - theirs) / theirs).abs().max():.1e}, weights abs {worst:.1e}")


def test_gradient_accumulation_weighs_every_token_the_same(one_rank):
    """Four micro-batches of one pack against one of four packs: equal once no loss is a mean over a micro-batch."""
    directory, _ = one_rank
    curves = []
    for micro_batch_size in (1, 4):
        run_dir = directory / f"accumulate{micro_batch_size}"
        config = tiny_config(
            directory, run_dir=str(run_dir), micro_batch_size=micro_batch_size, steps=5,
            loss={"aux_loss_coef": 0.0, "z_loss_coef": 0.0},
        )
        result = launch(write_config(directory / "accumulate.json", config), cwd=directory)
        assert result.returncode == 0, result.stderr
        curves.append(torch.tensor(losses(run_dir)))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=0)
