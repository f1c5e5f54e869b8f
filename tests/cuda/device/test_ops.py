"""Every op on the GPU: values, the same bits twice, and CUDA graphs."""

import pytest
import torch

from tests.cuda.cases import CASES, SHAPES, bits, check, on_device
from xtuner import ops
from xtuner.ops import OpError

pytestmark = pytest.mark.gpu
each_case = pytest.mark.parametrize("case", [case for case in CASES if case.has_kernel], ids=lambda case: case.op)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@each_case
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(case, shape, dtype, device, rng):
    inputs = case.inputs(shape, dtype, rng)
    check(case, case.call(*on_device(inputs, device)), inputs, dtype)


@each_case
@each_dtype
def test_same_bits_every_time(case, dtype, device, rng):
    inputs = on_device(case.inputs(SHAPES[-1], dtype, rng), device)
    first = case.call(*inputs)
    for _ in range(3):
        for a, b in zip(case.call(*inputs), first, strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.needs_cuda
@each_case
@each_dtype
def test_a_captured_graph_computes_on_new_inputs(case, dtype, device, rng):
    """Capturing fails where an op waits for the GPU or allocates by itself."""
    shape = SHAPES[-1]
    # A graph replays fixed shapes: maps of other routings have them, too.
    static = on_device(case.inputs(shape, dtype, rng), device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        case.call(*static)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.call(*static)
    for _ in range(2):
        fresh = case.inputs(shape, dtype, rng)
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        for t in got:
            t.view(torch.uint8).fill_(0xFF)
        graph.replay()
        check(case, got, fresh, dtype)


@pytest.mark.needs_cuda
@each_case
def test_another_stream(case, device, rng):
    inputs = case.inputs(SHAPES[1], torch.bfloat16, rng)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # inputs arrive late, and on this stream
        got = case.call(*on_device(inputs, device))
    stream.synchronize()
    check(case, got, inputs, torch.bfloat16)


@pytest.mark.needs_cuda
def test_a_bad_index_is_noted(device):
    ops.route_map(torch.tensor([[0, 7]], device=device), 4, 2)
    with pytest.raises(OpError, match=r"route_map: topk_idx \(flat index 1\) must be in \[-1, E\)"):
        ops.raise_faults()


@pytest.mark.needs_cuda
def test_misaligned_memory_is_refused(device):
    x = torch.zeros(2 * 128 + 1, device=device)[1:].view(2, 128)
    with pytest.raises(OpError, match="x must start at a multiple of 16 bytes"):
        ops.quantize_1x128(x)


@pytest.mark.needs_cuda
def test_more_than_two_to_the_31_elements(device):
    tokens, hidden = (1 << 19) + 3, 4096
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=device)
    x[-1] = 3
    row_of = torch.arange(tokens, dtype=torch.int32, device=device).view(-1, 1)
    out = ops.permute(x, row_of, row_of.flatten())
    assert (out[-1] == 3).all()
    assert not out[: 1 << 10].any()
    assert (ops.quantize_1x128(x)[0][-1].float() == 448).all()
