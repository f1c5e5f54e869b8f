"""The expert-parallel ops in a group of one: what needs no second process. See tests/parallel for more ranks."""

import gc

import pytest
import torch

from tests.ops.test_ops import ALONE, DTYPES, LAYOUTS, check, randn, routing
from xtuner import ops
from xtuner.ops import OpError, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dispatch_and_combine(layout, dtype):
    idx = routing(*layout)
    x = randn(layout[0], 24, dtype=dtype).requires_grad_()
    probs = torch.rand(idx.shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    exact, exact_probs = x.detach().double().requires_grad_(), probs.detach().double().requires_grad_()
    route = ops.ep_prepare(idx, layout[2], ALONE)
    y = ops.ep_dispatch(x, route, ALONE)
    out = ops.ep_combine(y, route, ALONE, probs)
    (rows,) = reference.ep_dispatch([exact], [idx], layout[2])
    (expected,) = reference.ep_combine([rows], [idx], layout[2], [exact_probs])
    assert torch.equal(y.double(), rows)
    check(out, expected, dtype)
    grad = randn(*out.shape, dtype=dtype, seed=9)
    out.backward(grad)
    expected.backward(grad.double())
    # A token's K gradients are rounded to the dtype before they are summed.
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-6, atol=2e-2 if dtype == torch.bfloat16 else 2e-5)
    torch.testing.assert_close(probs.grad.double(), exact_probs.grad, rtol=1e-4, atol=1e-4)


def test_unweighted_combine_is_the_gradient_of_dispatch():
    idx = routing(37, 2, 5)
    route = ops.ep_prepare(idx, 5, ALONE)
    x = randn(37, 8).requires_grad_()
    y = ops.ep_dispatch(x, route, ALONE)
    grad = randn(*y.shape, seed=4).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
    assert torch.equal(dx, ops.ep_combine(grad, route, ALONE))
    assert torch.equal(torch.autograd.grad(dx, grad, x.detach())[0], y)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantizing_before_the_dispatch_gives_what_quantizing_after_gives(dtype):
    route = ops.ep_prepare(routing(37, 2, 5), 5, ALONE, capacity=80)
    x = randn(37, 384)
    q, scale = ops.ep_dispatch_quantized(*ops.quantize_1x128(x, dtype=dtype), route, ALONE)
    expected_q, expected_scale = ops.quantize_1x128(ops.ep_dispatch(x, route, ALONE), route.offsets, dtype=dtype)
    assert q.dtype == dtype and torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


def test_capacity():
    idx = torch.tensor([[0, 1], [1, 2], [-1, 2]])
    route = ops.ep_prepare(idx, 3, ALONE, capacity=8)
    assert route.dest[..., 1].tolist() == [[0, 1], [2, 3], [-1, 4]] and route.offsets.tolist() == [0, 1, 3, 5]
    rows = ops.ep_dispatch(torch.ones(3, 4), route, ALONE)
    assert rows.sum(1).tolist() == [4, 4, 4, 4, 4, 0, 0, 0]
    short = ops.ep_prepare(idx, 3, ALONE, capacity=4)
    assert torch.equal(short.counts, route.counts) and short.offsets.tolist() == [0, 1, 3, 4]
    out = ops.ep_combine(ops.ep_dispatch(torch.ones(3, 4), short, ALONE), short, ALONE)
    assert out[:, 0].tolist() == [2, 2, 0]


def test_shared_tensors_are_read_in_place_and_their_memory_is_used_again():
    group = ops.HostEpGroup(0, 1, lambda mine: [mine])
    x = group.empty((5, 3), torch.bfloat16)
    assert group.share(x) is x and group.memory.allocated == 4096
    elsewhere = torch.randn(5, 3)
    copy = group.share(elsewhere)
    assert torch.equal(copy, elsewhere) and group.memory.owns(copy) and not group.memory.owns(elsewhere)
    assert group.empty((0, 3), torch.float32).shape == (0, 3)
    address, view = x.data_ptr(), x[1:]
    del x
    assert group.empty((5, 3), torch.bfloat16).data_ptr() != address, "a view still needs it"
    del view
    assert group.empty((5, 3), torch.bfloat16).data_ptr() == address


def test_expert_products_write_into_the_memory_of_the_group():
    route = ops.ep_prepare(routing(37, 2, 5), 5, ALONE)
    x, w13, w2 = (randn(*shape, seed=s) for s, shape in enumerate([(37, 8), (5, 12, 8), (5, 8, 6)]))
    rows = ops.ep_dispatch(x, route, ALONE).requires_grad_()
    results = []
    for group in (None, ALONE):
        h = ops.gemm_m_grouped_swiglu(rows, w13, route.offsets, group=group)
        y = ops.gemm_m_grouped(h, w2, route.offsets, group=group)
        (grad,) = torch.autograd.grad(y.square().sum(), rows)
        assert [ALONE.memory.owns(t) for t in (y, grad)] == [group is ALONE] * 2
        results.append((y, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_input_names_the_argument():
    group = ops.HostEpGroup(0, 1, lambda mine: [mine])
    route = ops.ep_prepare(routing(12, 2, 3), 3, group)
    with pytest.raises(OpError, match=r"ep_dispatch: x must be .* \[T, H\], got .*(float64|unsupported)"):
        ops.ep_dispatch(randn(12, 8).double(), route, group)
    with pytest.raises(OpError, match="ep_dispatch: dest must be .*T=11"):
        ops.ep_dispatch(randn(11, 8), route, group)
    with pytest.raises(OpError, match="ep_combine: probs must be .*T=12, K=2"):
        ops.ep_combine(randn(int(route.offsets[-1]), 8), route, group, torch.rand(12, 3))
    with pytest.raises(OpError, match=r"topk_idx\[0, 0\] \(token 0\) must be in \[-1, E=3\), got 3"):
        ops.ep_prepare(torch.tensor([[3]]), 3, group)
    with pytest.raises(OpError, match="gave this group up in exchange 2; make a new group"):
        ops.ep_prepare(torch.tensor([[0]]), 3, group)
    with pytest.raises(OpError, match="world must be in"):
        ops.HostEpGroup(0, 65, lambda mine: [mine])
    last = group.id
    del group
    gc.collect()
    with pytest.raises(OpError, match=f"group {last} no longer exists"):
        torch.ops.xtuner.ep_dispatch(randn(12, 8), *route, last)
