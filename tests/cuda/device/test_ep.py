"""The all-to-all with several ranks on one device. With --device cpu its Python code runs over the CPU's kernels."""

import pytest
import torch

from tests.cuda.ep_threads import Threads, check_step, draw, step
from xtuner import ops
from xtuner.ops import OpError

pytestmark = pytest.mark.gpu
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def warm_up(device, *arguments) -> None:
    """Loading a kernel waits for the device: not while another rank's kernel there waits for this one."""
    alone = Threads(1, device)
    groups = alone.run(alone.group)
    inputs = [draw(0, 1, *arguments)]
    step(alone, groups, inputs, arguments[1])


@each_dtype
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("hidden", [17, 128, 1032])
def test_oracle(world_size, hidden, dtype, device):
    arguments = (hidden, 8, 3, dtype)
    warm_up(device, *arguments, 0)
    threads = Threads(world_size, device)
    groups = threads.run(threads.group)
    for seed in range(4):  # the memory grows with the loads, and then suffices
        inputs = [draw(rank, world_size, *arguments, seed) for rank in range(world_size)]
        got = step(threads, groups, inputs, 8, capacity=600 if seed % 2 else None)
        check_step(got, inputs, 8, dtype)
        again = step(threads, groups, inputs, 8, capacity=600 if seed % 2 else None)
        for a, b in zip(got, again, strict=True):
            for name in a:
                assert torch.equal(a[name], b[name]), f"{name} has other bits the second time"


def test_quantized_rows_bring_their_scales(device):
    def body(threads, groups, rank):
        rng = torch.Generator().manual_seed(rank)
        x = torch.randn(20 + rank, 384, generator=rng).to(device)
        idx = torch.randint(-1, 4, (20 + rank, 2), generator=rng).to(device)
        route = ops.ep_prepare(idx, 4, groups[rank], 150)
        groups[rank].reserve(1 << 20)
        got = ops.ep_dispatch_quantized(*ops.quantize_1x128(x), route, groups[rank])
        return *got, *ops.quantize_1x128(ops.ep_dispatch(x, route, groups[rank]), route.offsets)

    for world_size in (1, 2):
        threads = Threads(world_size, device)
        groups = threads.run(threads.group)
        for q, scale, wanted_q, wanted_scale in threads.run(lambda rank, shared=(threads, groups): body(*shared, rank)):
            assert torch.equal(q.view(torch.uint8), wanted_q.view(torch.uint8))
            assert torch.equal(scale, wanted_scale)


@pytest.mark.needs_cuda
def test_a_missing_rank_is_named_within_the_bound(device):
    warm_up(device, 8, 4, 1, torch.float32, 0)
    threads = Threads(2, device)
    groups = threads.run(lambda rank: threads.group(rank, timeout_s=0.5))
    idx = torch.tensor([[0], [2]], device=device)
    threads.run(lambda rank: ops.ep_prepare(idx, 4, groups[rank]) if rank == 0 else None)
    with pytest.raises(OpError, match="ep_prepare: exchange 1: rank 1 did not come within the group's timeout_s"):
        ops.raise_faults()
    threads.run(lambda rank: ops.ep_prepare(idx, 4, groups[rank]) if rank == 0 else None)  # waits no more
    ops.raise_faults()


@pytest.mark.needs_cuda
def test_a_captured_step_goes_on_counting_exchanges(device):
    """Prepare, dispatch and combine of a group of one, replayed on other tokens."""
    threads = Threads(1, device)
    (group,) = threads.run(threads.group)
    group.reserve(1 << 20)
    x, idx = torch.randn(40, 128, device=device), torch.randint(4, (40, 2), device=device)

    def run():
        route = ops.ep_prepare(idx, 4, group, 80)
        return ops.ep_combine(ops.ep_dispatch(x, route, group), route, group)

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(3):
        fresh = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(40, 128, generator=fresh))
        idx.copy_(torch.randint(4, (40, 2), generator=fresh))
        graph.replay()
        torch.testing.assert_close(out, 2 * x)
