"""Checkpoints know nothing of layouts: each goes on bit for bit in its own, and within rounding in every other."""

import json
import shutil

import pytest
import torch

from tests.engine.tiny import ARCH, exported_weights, losses, tiny_config
from tests.parallel import train_rank

# name -> ranks, fields of ParallelConfig
LAYOUTS = {
    "1": (1, {}),
    "fsdp2": (2, {}),
    "fsdp4": (4, {}),
    "hsdp2x2": (4, {"shard_size": 2}),
    "ep2": (2, {"ep_size": 2}),
    "ep4": (4, {"ep_size": 4}),
    "ep2xfsdp2": (4, {"ep_size": 2}),
    "sp4": (4, {"sp_size": 4}),
    "sp2xep2": (4, {"sp_size": 2, "ep_size": 2}),
}
STEPS, SAVED = 6, 3
SAFE_MARGIN = 1e-5  # rounding differs between layouts by less


class Runs:
    """Runs of one configuration in any layout, each in a directory of its own."""

    def __init__(self, ranks, root):
        self.ranks, self.root = ranks, root
        self.margins = []

    def train(self, name, layout, resume=False):
        """The run directory."""
        num_ranks, fields = LAYOUTS[layout]
        run_dir = self.root / name
        config = tiny_config(
            self.root, run_dir=str(run_dir), steps=STEPS, parallel=fields, checkpoint={"every": SAVED},
            micro_batch_size=4 // (num_ranks // fields.get("sp_size", 1)), optim={"eps": 1e-6},
        )  # fmt: skip
        self.margins += self.ranks.run(train_rank.run, num_ranks, config, resume)
        return run_dir

    def uninterrupted(self, layout):
        return self.root / layout if (self.root / layout).exists() else self.train(layout, layout)

    def continued(self, layout, other):
        """What `layout` saved in mid-run, gone on with in `other`."""
        name = f"{layout}-{other}"
        shutil.copytree(self.uninterrupted(layout), self.root / name)
        shutil.rmtree(self.root / name / "checkpoints" / f"step-{STEPS:08d}")
        return self.train(name, other, resume=True)


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    runs = Runs(ranks, tmp_path_factory.mktemp("resume"))
    yield runs
    assert min(runs.margins) > SAFE_MARGIN, "a routing decision hung on rounding"


def check_exact(runs, layout):
    whole, continued = runs.uninterrupted(layout), runs.continued(layout, layout)
    assert losses(whole) == losses(continued) and len(losses(whole)) == STEPS
    assert losses(whole, "validation") == losses(continued, "validation")
    weights, expected = exported_weights(continued), exported_weights(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def check_transfer(runs, layout, other):
    same(runs.continued(layout, other), runs.uninterrupted(layout))


def same(run_dir, expected_dir):
    ours, theirs = (torch.tensor(losses(d) + losses(d, "validation")) for d in (run_dir, expected_dir))
    assert len(ours) == STEPS + 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    weights, expected = exported_weights(run_dir), exported_weights(expected_dir)
    assert weights.keys() == expected.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("layout", ["fsdp2", "ep2xfsdp2"])
def test_resumes_bit_for_bit(runs, layout):
    check_exact(runs, layout)


@pytest.mark.parametrize(("layout", "other"), [("ep2xfsdp2", "sp2xep2"), ("hsdp2x2", "1"), ("fsdp2", "ep4")])
def test_goes_on_in_another_layout(runs, layout, other):
    check_transfer(runs, layout, other)


def test_every_layout_learns_the_same(runs):
    same(runs.uninterrupted("ep2xfsdp2"), runs.uninterrupted("fsdp2"))


def test_keys_are_plain_names_with_global_shapes(runs):
    from torch.distributed.checkpoint import FileSystemReader

    path = runs.uninterrupted("ep2xfsdp2") / "checkpoints" / f"step-{SAVED:08d}"
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    moe, hidden = ARCH["moe"], ARCH["hidden_size"]
    shapes = {
        "w13": [moe["num_experts"] * 2 * moe["moe_intermediate_size"], hidden],
        "w2": [moe["num_experts"] * hidden, moe["moe_intermediate_size"]],
    }
    for name, shape in shapes.items():
        assert list(stored[f"model.layers.0.moe.{name}"].size) == shape
        assert list(stored[f"optim.state.layers.0.moe.{name}.exp_avg"].size) == shape
    assert not [key for key in stored if "rank" in key and not key.startswith("rng.")]
    assert json.loads((path / "state.json").read_text())["step"] == SAVED


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_resumes_bit_for_bit(runs, layout):
    check_exact(runs, layout)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_on_in_every_other(runs, layout):
    for other in LAYOUTS:
        if other != layout:
            check_transfer(runs, layout, other)
