"""Expert parallelism: the dispatchers against the local one, between real processes."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.parallel import ep_rank
from xtuner.config import MoEConfig
from xtuner.nn.moe import MoE
from xtuner.parallel import AllToAllDispatcher, FusedDispatcher

pytestmark = pytest.mark.usefixtures("imports_happen_once")

@pytest.mark.parametrize("world_size", [2, 4])
def test_same_bits_as_the_local_dispatcher(world_size, tmp_path):
    arguments = (world_size, tmp_path, 16)
    mp.start_processes(ep_rank.same_as_local, arguments, nprocs=world_size, start_method="forkserver")


@pytest.mark.long
def test_same_bits_over_many_steps(tmp_path):
    mp.start_processes(ep_rank.same_as_local, (4, tmp_path, 1000), nprocs=4, start_method="forkserver")


def test_a_killed_rank_is_named_and_leaves_no_memory(tmp_path):
    before = set(os.listdir("/dev/shm"))
    context = mp.get_context("forkserver")
    ranks = [context.Process(target=ep_rank.die_in_mid_step, args=(r, 3, tmp_path)) for r in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, -9, 0]
    said = [(tmp_path / f"{r}.txt").read_text() for r in (0, 2)]
    assert any("waited 1 s for rank 1: expected exchange 16, seen 15" in text for text in said), said
    assert all("ep_combine: rank" in text for text in said), said
    assert {n for n in set(os.listdir("/dev/shm")) - before if "xtuner" in n} == set()


@pytest.fixture
def process_group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_moe_block_with_each_dispatcher(process_group_of_one):
    torch.manual_seed(0)
    moe = MoE(16, MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12))
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.3)
    x = torch.randn(30, 16)

    def run(block):
        y, _ = block(x)
        y.square().sum().backward()
        gradients = [p.grad.clone() for p in moe.parameters()]
        moe.zero_grad()
        return [y.detach(), *gradients]

    expected = run(moe)
    for dispatcher in (AllToAllDispatcher(), FusedDispatcher()):
        moe.dispatcher = dispatcher
        for got, want in zip(run(moe), expected, strict=True):
            assert torch.equal(got, want)
    # The host reads the number of rows: outputs have a size that is only known at run time.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for got, want in zip(run(torch.compile(moe, fullgraph=True)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
