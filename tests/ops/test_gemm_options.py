"""Grouped products that gather their rows, add a bias or apply SwiGLU: the bits of the separate ops, and gradients."""

import pytest
import torch

from tests.ops.test_ops import DTYPES, LAYOUTS, check, maps, poison_tail, randn
from xtuner import ops
from xtuner.ops import OpError, reference


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def operands(layout, dtype, kd=24, n=34):
    tokens, _, experts = layout
    x = randn(tokens, kd, dtype=dtype) / 4
    b = randn(experts, n, kd, dtype=dtype, seed=2) / 4
    return x, b, randn(experts, n, dtype=dtype, seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_gives_the_bits_of_permute(layout, dtype):
    _, offsets, *row_maps = maps(*layout)
    x, b, bias = operands(layout, dtype)
    rows = ops.permute(x, *row_maps)
    for trans_b, weight in ((True, b), (False, b.transpose(1, 2).contiguous())):
        gathered = ops.gemm_m_grouped(x, weight, offsets, trans_b, bias, tuple(row_maps))
        assert torch.equal(gathered, ops.gemm_m_grouped(rows, weight, offsets, trans_b, bias))
    grad = randn(rows.shape[0], 34, dtype=dtype, seed=4)
    assert torch.equal(
        ops.gemm_k_grouped(grad, x, offsets, maps=tuple(row_maps)), ops.gemm_k_grouped(grad, rows, offsets)
    )


@pytest.mark.parametrize("scalars", [(1.0, None, 0.0), (1.702, 1.5, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_gives_the_bits_of_the_separate_op(layout, dtype, scalars):
    _, offsets, *row_maps = maps(*layout)
    x, b, bias = operands(layout, dtype)
    product = ops.gemm_m_grouped(x, b, offsets, True, bias, tuple(row_maps))
    act, saved = torch.ops.xtuner.gemm_m_grouped_swiglu(x, b, offsets, bias, *row_maps, *scalars)
    assert torch.equal(saved, product)
    assert torch.equal(act, ops.swiglu(product, offsets, *scalars))


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("name", ["gemm_m_grouped", "gemm_m_grouped_swiglu"])
def test_gradients_of_all_inputs(layout, name, gathers):
    _, offsets, *row_maps = maps(*layout)
    x, b, bias = operands(layout, torch.float32)
    clean = x if gathers else ops.permute(x, *row_maps)
    inputs = [(clean if gathers else poison_tail(clean, offsets)).clone(), b, bias]
    inputs = [t.requires_grad_() for t in inputs]
    exact = [t.double().detach().requires_grad_() for t in (clean, b, bias)]
    options = (True,) if name == "gemm_m_grouped" else ()
    out = getattr(ops, name)(inputs[0], inputs[1], offsets, *options, inputs[2], tuple(row_maps) if gathers else None)
    expected = getattr(reference, name)(exact[0], exact[1], offsets, *options, exact[2], row_maps if gathers else None)
    check(out, expected, torch.float32)
    grad = randn(*out.shape, seed=9)
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, exact, strict=True):
        check(ours.grad, theirs.grad, torch.float32)


def test_gradient_through_a_gathered_weight_gradient():
    _, offsets, *row_maps = maps(37, 2, 5)
    a, x = randn(row_maps[1].shape[0], 6).requires_grad_(), randn(37, 8, seed=2).requires_grad_()
    exact = [t.double().detach().requires_grad_() for t in (a, x)]
    out = ops.gemm_k_grouped(a, x, offsets, maps=tuple(row_maps))
    expected = reference.gemm_k_grouped(*exact, offsets, maps=row_maps)
    check(out, expected, torch.float32)
    grad = randn(*out.shape, seed=9)
    out.backward(grad)
    expected.backward(grad.double())
    check(a.grad, exact[0].grad, torch.float32)
    check(x.grad, exact[1].grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_of_a_small_weight_gradient(dtype):
    """Such rows are summed in parts; the number of threads does not show."""
    rows = 9000
    offsets = torch.tensor([0, 3, 3, rows])
    a, b = randn(rows, 5, dtype=dtype), randn(rows, 9, dtype=dtype, seed=2)
    expected = reference.gemm_k_grouped(a.double(), b.double(), offsets)
    out = ops.gemm_k_grouped(a, b, offsets, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.gemm_k_grouped(a, b, offsets, torch.float32), out)
    finally:
        torch.set_num_threads(before)
    twice = ops.gemm_k_grouped_(out.clone(), a, b, offsets, beta=1.0)
    torch.testing.assert_close(twice, 2 * out)


def test_bad_options_are_named():
    _, offsets, row_of, src = maps(12, 2, 3)
    x, b, bias = operands((12, 2, 3), torch.float32)
    with pytest.raises(OpError, match=r"gemm_m_grouped: bias must be float32 \[E=3, N=34\], got float32 \[3, 33\]"):
        ops.gemm_m_grouped(x, b, offsets, True, bias[:, :33].contiguous(), (row_of, src))
    with pytest.raises(OpError, match=r"gemm_m_grouped: src\[0\] must be in \[-1, T\*K=24\), got 99"):
        ops.gemm_m_grouped(x, b, offsets, True, None, (row_of, torch.full_like(src, 99)))
    with pytest.raises(OpError, match=r"gemm_k_grouped: src must be int32 \[R=5\]"):
        ops.gemm_k_grouped(randn(5, 3), x, torch.tensor([0, 5]), maps=(row_of, src))
    with pytest.raises(OpError, match="act needs an even N"):
        ops.gemm_m_grouped_swiglu(x, b[:, :33].contiguous(), offsets, None, (row_of, src))
    with pytest.raises(OpError, match="limit must be positive, got -1"):
        ops.gemm_m_grouped_swiglu(x, b, offsets, None, (row_of, src), 1.0, -1.0)
