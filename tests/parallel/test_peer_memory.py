"""Groups whose memory somebody else makes, as on GPUs, with the host's memory and threads for ranks."""

import pytest
import torch
import torch.distributed as dist

from tests.cuda.ep_threads import Threads, check_step, draw, step
from xtuner import ops
from xtuner.config import MoEConfig
from xtuner.nn.moe import MoE
from xtuner.ops import OpError
from xtuner.parallel import FusedDispatcher, dispatch
from xtuner.parallel.peer_memory import Place, check_reach

CPU = torch.device("cpu")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step(world_size):
    threads = Threads(world_size, CPU)
    groups = threads.run(threads.group)
    for seed in range(6):
        dtype = torch.bfloat16 if seed % 2 else torch.float32
        inputs = [draw(rank, world_size, 24, 6, 2, dtype, seed) for rank in range(world_size)]
        check_step(step(threads, groups, inputs, 6, capacity=400 if seed % 3 else None), inputs, 6, dtype)


@pytest.fixture
def process_group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["exact", "static"])
def test_the_dispatcher_reserves_what_its_ops_need(mode, process_group_of_one, monkeypatch):
    group = Threads(1, CPU).group(0)
    monkeypatch.setattr(dispatch, "make_group", lambda *arguments: group)
    torch.manual_seed(0)
    moe = MoE(16, MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12))
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.3)
    x = torch.randn(30, 16)

    def run():
        y, _ = moe(x)
        y.square().sum().backward()
        gradients = [p.grad.clone() for p in moe.parameters()]
        moe.zero_grad()
        return [y.detach(), *gradients]

    expected = run()
    moe.dispatcher = FusedDispatcher(mode=mode)
    for _ in range(3):
        assert all(torch.equal(got, want) for got, want in zip(run(), expected, strict=True))


def test_what_is_kept_outlives_the_shared_memory():
    group = Threads(1, CPU).group(0)
    group.reserve(1 << 12)
    idx = torch.tensor([[0], [1]])
    route = ops.ep_prepare(idx, 2, group)
    first = ops.ep_dispatch(torch.ones(2, 4), route, group)
    for _ in range(4):
        ops.ep_dispatch(torch.zeros(2, 4), route, group)
    assert (first == 1).all()


def test_too_little_room_is_an_error():
    group = Threads(1, CPU).group(0)
    route = ops.ep_prepare(torch.tensor([[0], [1]]), 2, group)
    with pytest.raises(OpError, match=r"rank 0 needs 32 bytes for \[2, 4\] torch.float32 .*call EpGroup.reserve"):
        ops.ep_dispatch(torch.ones(2, 4), route, group)


def test_ranks_must_reserve_alike():
    threads = Threads(2, CPU)
    groups = threads.run(threads.group)
    with pytest.raises(OpError, match=r"num_bytes must be the same on all ranks, got \[256, 512\]"):
        threads.run(lambda rank: groups[rank].reserve(256 * (rank + 1)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Place("b", "g1", frozenset({"g0", "g1"})), "ranks 0 and 1 .* are on two machines, a and b"),
        (Place("a", "g0", frozenset({"g0"})), "ranks 0 and 1 .* are on one GPU, g0"),
        (Place("a", "g1", frozenset({"g1"})), "ranks 0 and 1 .* cannot read each other's memory"),
    ],
)
def test_ranks_that_cannot_reach_each_other_are_named(other, message):
    check_reach([Place("a", "g0", frozenset({"g0", "g1"})), Place("a", "g1", frozenset({"g0", "g1"}))])
    with pytest.raises(ValueError, match=f"{message}.*use parallel.dispatcher=all_to_all"):
        check_reach([Place("a", "g0", frozenset({"g0", "g1"})), other])
