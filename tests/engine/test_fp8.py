"""Training in float8 against bfloat16, and configurations that cannot."""

import pytest
import torch

from tests.engine.tiny import ARCH, launch, losses, make_texts, tiny_config, write_config
from xtuner import run

WIDE = ARCH | {
    "hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 4, "initializer_range": 0.02,
    "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}  # fmt: skip


def config_for(directory, name, **fields):
    fields = {"model": {"arch": WIDE}, "parallel": {"compute_dtype": "bfloat16"}, "validation": {"every": 0}} | fields
    config = tiny_config(directory, run_dir=str(directory / name), **fields)
    config["checkpoint"] = {"export_hf": False, "final": False}
    return write_config(directory / f"{name}.json", config)


def smoothed(values, width=20):
    return torch.tensor(values).unfold(0, width, 1).mean(1)


@pytest.mark.long
def test_the_loss_curve_is_that_of_bfloat16(tmp_path):
    """Over text that never repeats: where a model learns by heart, its loss ends near 0 and ratios mean nothing."""
    texts = make_texts(tmp_path / "texts.jsonl", 4000, seed=3)
    curves = []
    for enabled in (False, True):
        fields = {"fp8": {"enabled": enabled}, "steps": 300, "data": {"train": [str(texts)]}}
        config_file = config_for(tmp_path, f"fp8-{enabled}", **fields)
        assert run.main(["train", str(config_file)]) == 0
        curves.append(smoothed(losses(tmp_path / f"fp8-{enabled}")))
    difference = ((curves[1] - curves[0]) / curves[0]).abs().max().item()
    print(f"loss {curves[0][0]:.3f} -> {curves[0][-1]:.3f} in bfloat16, {curves[1][-1]:.3f} in float8, "
          f"largest difference {100 * difference:.2f} %")  # fmt: skip
    assert curves[0][-1] < 0.5 * curves[0][0] and not torch.equal(*curves)
    assert difference < 0.01


def test_resumes_bit_for_bit(tmp_path):
    config_file = config_for(tmp_path, "resumed", fp8={"enabled": True}, steps=6)
    arguments = ["train", str(config_file), "checkpoint.every=3", "checkpoint.final=true"]
    assert run.main(arguments) == 0
    whole = losses(tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoints" / "step-00000006").rename(tmp_path / "removed")
    assert run.main([*arguments, "--resume", "auto"]) == 0
    assert losses(tmp_path / "resumed") == whole


def test_a_model_whose_widths_do_not_fit(tmp_path, capsys):
    config_file = config_for(tmp_path, "narrow", model={"arch": ARCH}, fp8={"enabled": True})
    assert run.main(["train", str(config_file)]) == 2
    message = capsys.readouterr().err
    assert "layers.0.attn.wq.weight is made of 32 x 32 matrices, but float8 needs multiples of 128" in message
    assert "parallel.compute_dtype=bfloat16" in message


def test_two_ranks_with_split_experts(tmp_path):
    parallel = {"compute_dtype": "bfloat16", "ep_size": 2}
    config_file = config_for(tmp_path, "ep", fp8={"enabled": True}, steps=3, micro_batch_size=2, parallel=parallel)
    result = launch(config_file, "--nproc", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "ep")) == 3
