"""Muon over sharded matrices: the same weights in every layout, and a state that moves between them."""

import numpy as np
import pytest

from tests.parallel import layout_rank, muon_rank
from xtuner.checkpoint.hf import save_hf
from xtuner.models import config_to_hf, hf_map

# Rounding of the gradient, 1e-6, grows by up to 3.44^5 in directions that hardly occur in a matrix.
TOLERANCE = 1e-3

LAYOUTS = {
    "1 rank": (1, {}),
    "FSDP 2": (2, {}),
    "FSDP 4": (4, {}),
    "HSDP 2x2": (4, {"shard_size": 2}),
    "EP 2": (2, {"ep_size": 2}),
    "EP 2 x FSDP 2": (4, {"ep_size": 2}),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("muon") / "hf"
    save_hf(layout_rank.make_model(), hf_map(layout_rank.ARCH), directory, config=config_to_hf(layout_rank.ARCH))
    return directory


@pytest.fixture(scope="module")
def expected():
    return {name: value.numpy() for name, value in muon_rank.plain(4).items()}


def assert_same(values, expected):
    start = {name: p.detach().numpy() for name, p in layout_rank.make_model().named_parameters()}
    for name, value in values.items():
        moved = np.linalg.norm(expected[name] - start[name])
        assert np.linalg.norm(value - expected[name]) < TOLERANCE * moved, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_weights_in_every_layout(ranks, weights, expected, name):
    num_ranks, fields = LAYOUTS[name]
    assert_same(ranks.run(muon_rank.in_layout, num_ranks, fields, range(4), weights)[0], expected)


@pytest.mark.parametrize(("saved", "continued"), [("FSDP 2", "EP 2 x FSDP 2"), ("EP 2 x FSDP 2", "1 rank")])
def test_the_state_moves_between_layouts(ranks, weights, expected, tmp_path, saved, continued):
    num_ranks, fields = LAYOUTS[saved]
    ranks.run(muon_rank.in_layout, num_ranks, fields, range(2), weights, None, tmp_path)
    num_ranks, fields = LAYOUTS[continued]
    values = ranks.run(muon_rank.in_layout, num_ranks, fields, range(2, 4), weights, tmp_path / "step-00000002")[0]
    assert_same(values, expected)
