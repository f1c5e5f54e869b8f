"""Experts as one op, and their backward in one pass: the bits of the separate ops, and the oracle's values."""

import pytest
import torch

from tests.ops.test_ops import DTYPES, LAYOUTS, check, maps, poison_tail, randn
from xtuner import ops
from xtuner.ops import OpError, reference


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def dswiglu_inputs(layout, dtype, d=24, width=34):
    """dy, b, offsets, x; NaN in the rows that nobody may read."""
    _, offsets, _, src = maps(*layout)
    rows = src.shape[0]
    dy, x = (poison_tail(randn(rows, n, dtype=dtype, seed=n), offsets) for n in (d, 2 * width))
    return dy, randn(layout[2], d, width, dtype=dtype, seed=2) / 4, offsets, x


@pytest.mark.parametrize("scalars", [(1.0, None, 0.0), (1.702, 1.5, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dswiglu_gives_the_bits_of_the_separate_ops(layout, dtype, scalars):
    dy, b, offsets, x = dswiglu_inputs(layout, dtype)
    dx, act, dweights = ops.gemm_m_grouped_dswiglu(dy, b, offsets, x, None, *scalars)
    g = ops.gemm_m_grouped(dy, b, offsets, False)
    assert torch.equal(dx, torch.ops.xtuner.swiglu_bwd(g, x, offsets, *scalars))
    assert torch.equal(act, ops.swiglu(x, offsets, *scalars))
    assert dweights.shape == (0,)


@pytest.mark.parametrize("scalars", [(1.0, None, 0.0), (1.702, 1.5, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_dswiglu(layout, dtype, scalars):
    dy, b, offsets, x = dswiglu_inputs(layout, dtype)
    weights = poison_tail(torch.rand(len(x), generator=torch.Generator().manual_seed(5)), offsets)
    dx, act, dweights = ops.gemm_m_grouped_dswiglu(dy, b, offsets, x, weights, *scalars)
    clean = [torch.nan_to_num(t).double() for t in (dy, b)]
    expected = reference.gemm_m_grouped_dswiglu(*clean, offsets, torch.nan_to_num(x).double(), weights, *scalars)
    assert (dx.dtype, act.dtype, dweights.dtype) == (dtype, dtype, torch.float32)
    for ours, theirs in zip((dx, act, dweights), expected, strict=True):
        if dtype == torch.bfloat16:  # the product is rounded before the activation's slope multiplies it
            torch.testing.assert_close(ours.double(), theirs, rtol=2**-6, atol=5e-2)
        else:
            check(ours, theirs, dtype)


def test_the_gradient_of_the_weights_is_that_of_unpermute():
    """Weights of one choice per token, applied to the experts' results."""
    _, offsets, row_of, src = maps(64, 1, 4)
    x, b, dout = randn(src.shape[0], 24), randn(4, 8, 12, seed=2), randn(64, 8, seed=3)
    probs = torch.rand(64, 1)
    y = ops.gemm_m_grouped(ops.swiglu(x, offsets), b, offsets)
    _, dprobs = torch.ops.xtuner.unpermute_bwd(dout, y, row_of, src, probs)
    of_row = ops.permute(probs, row_of, src)[:, 0].contiguous()
    _, _, dweights = ops.gemm_m_grouped_dswiglu(ops.permute(dout, row_of, src), b, offsets, x, of_row)
    assert dprobs.abs().max() > 1
    torch.testing.assert_close(ops.unpermute(dweights[:, None], row_of, src), dprobs, rtol=1e-5, atol=1e-5)


def mlp_inputs(layout, dtype, gathers, d=16, width=12):
    tokens, _, experts = layout
    _, offsets, *row_maps = maps(*layout)
    x = randn(tokens, d, dtype=dtype)
    if not gathers:
        x = poison_tail(ops.permute(x, *row_maps), offsets)
    weights = randn(experts, 2 * width, d, dtype=dtype, seed=2) / 4, randn(experts, d, width, dtype=dtype, seed=3) / 4
    return [t.clone().requires_grad_() for t in (x, *weights)], offsets, tuple(row_maps) if gathers else None


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_mlp_gives_the_bits_of_the_separate_ops(layout, dtype, gathers):
    inputs, offsets, row_maps = mlp_inputs(layout, dtype, gathers)
    out = ops.grouped_mlp(*inputs, offsets, row_maps)
    separate = [t.detach().clone().requires_grad_() for t in inputs]
    act = ops.gemm_m_grouped_swiglu(*separate[:2], offsets, maps=row_maps)
    expected = ops.gemm_m_grouped(act, separate[2], offsets)
    grad = randn(*out.shape, dtype=dtype, seed=9)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(out, expected)
    for ours, theirs in zip(inputs, separate, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_grouped_mlp_computes_one_gradient_alone(wanted):
    inputs, offsets, row_maps = mlp_inputs((37, 2, 5), torch.float32, True)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    for i, t in enumerate(inputs):
        t.requires_grad_(i == wanted)
    out, expected = ops.grouped_mlp(*inputs, offsets, row_maps), reference.grouped_mlp(*exact, offsets, row_maps)
    check(out, expected, torch.float32)
    out.sum().backward()
    expected.sum().backward()
    check(inputs[wanted].grad, exact[wanted].grad, torch.float32)
    assert all(t.grad is None for i, t in enumerate(inputs) if i != wanted)


def test_grouped_mlp_keeps_no_activation():
    inputs, offsets, row_maps = mlp_inputs((37, 2, 5), torch.float32, True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ops.grouped_mlp(*inputs, offsets, row_maps)
    rows = row_maps[1].shape[0]
    assert (rows, 24) in kept and (rows, 12) not in kept and (rows, 16) not in kept


def test_grouped_mlp_compiles():
    inputs, offsets, row_maps = mlp_inputs((37, 2, 5), torch.float32, True)
    expected = ops.grouped_mlp(*inputs, offsets, row_maps)
    grads = torch.autograd.grad(expected.sum(), inputs)
    compiled = torch.compile(lambda *t: ops.grouped_mlp(*t, offsets, row_maps), fullgraph=True, backend="aot_eager")
    out = compiled(*inputs)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), inputs), grads, strict=True))


def test_bad_input_is_named():
    dy, b, offsets, x = dswiglu_inputs((37, 2, 5), torch.float32)
    with pytest.raises(OpError, match=r"gemm_m_grouped_dswiglu: x must be float32 \[R=77, 2I=68\], got .*\[77, 34\]"):
        ops.gemm_m_grouped_dswiglu(dy, b, offsets, x[:, :34].contiguous())
    with pytest.raises(OpError, match=r"gemm_m_grouped_dswiglu: weights must be float32 \[R=77\]"):
        ops.gemm_m_grouped_dswiglu(dy, b, offsets, x, torch.ones(3))
