"""MoE blocks whose experts live on other ranks: whatever the load, the results of a block that holds them all."""

import pytest
import torch

from tests.parallel import moe_rank
from tests.parallel.moe_rank import TOP_K
from xtuner.config import ParallelConfig
from xtuner.errors import ConfigError
from xtuner.parallel import dispatch_rounds

KINDS = ["fused", "all_to_all"]
LOADS = ["even", "unequal", "all to rank 0", "one expert", "one rank has all"]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", [*KINDS, "presum"])
def test_exact(ranks, kind, load, num_ranks):
    ranks.run(moe_rank.like_local, num_ranks, kind, {}, load, 21, None)


@pytest.mark.parametrize("kind", [*KINDS, "presum"])
@pytest.mark.parametrize(
    ("load", "num_ranks", "max_load"),
    [("all to rank 0", 2, 1.0),
     ("all to rank 0", 4, 1.5), ("one expert", 4, 0.3), ("unequal", 4, 0.2), ("even", 2, 0.5)],
)
def test_rounds_keep_to_the_bound(ranks, kind, load, num_ranks, max_load):
    tokens = sum(len(moe_rank.draw(load, rank, 21)[0]) for rank in range(num_ranks))
    most = -(-max_load * tokens * TOP_K // num_ranks)
    ranks.run(moe_rank.like_local, num_ranks, kind, {"max_load": max_load}, load, 21, most)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_take_turns_where_one_token_of_each_does_not_fit(ranks, kind):
    """R = 3: room for a single token."""
    ranks.run(moe_rank.like_local, 4, kind, {"max_load": 0.2}, "all to rank 0", 5, 3)
    said = ranks.run(moe_rank.refused, 4, kind, {"max_load": 0.1}, "all to rank 0", 5)
    assert said == ["dispatch: max_rows=2 must hold the num_experts_per_tok=3 rows of one token"] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_static(ranks, kind):
    for load, factor in (("even", 2.0), ("all to rank 0", 4.0), ("one expert", 4.0)):
        ranks.run(moe_rank.like_local, 4, kind, {"mode": "static", "capacity_factor": factor}, load, 21, None)
    bounds = {"mode": "static", "capacity_factor": 4.0, "max_load": 1.0}
    ranks.run(moe_rank.like_local, 4, kind, bounds, "all to rank 0", 20, 60)


@pytest.mark.parametrize("kind", KINDS)
def test_static_without_enough_room_fails_on_every_rank(ranks, kind):
    said = ranks.run(moe_rank.refused, 2, kind, {"mode": "static", "capacity_factor": 1.5}, "all to rank 0", 20)
    assert len(set(said)) == 1 and "rows of experts found no room in this step; raise parallel.ca" in said[0], said
    if kind == "fused":
        assert said[0].startswith("static dispatch: 30 rows")


def test_quotas_fill_the_room_and_no_more():
    rows = torch.tensor([[10, 0], [30, 7]])
    assert dispatch_rounds._quotas(rows, 12, 2).tolist() == [[2 + 2, 2 + 0], [2 + 6, 2 + 10]]


def test_presum_is_a_way_of_all_to_all():
    for field in ({"dispatcher": "fused"}, {"dispatch_mode": "static"}):
        with pytest.raises(ConfigError, match="combine=presum is a way of dispatcher=all_to_all"):
            ParallelConfig.parse({"combine": "presum", **field})
