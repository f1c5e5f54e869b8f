"""The product in float8 and its gradients, against float64 products of the dequantized operands."""

import pytest
import torch

from xtuner import ops
from xtuner.ops import OpError


def make(loads, n=256, k=128, unused=0, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(loads) + unused
    x = torch.randn(rows, k, generator=generator).to(dtype)
    x[sum(loads) :] = float("nan")
    weight = (torch.randn(len(loads) * n, k, generator=generator) * 0.1).to(dtype)
    offsets = torch.tensor([0, *loads]).cumsum(0)
    grad = torch.randn(rows, n, generator=generator).to(dtype)
    grad[sum(loads) :] = float("nan")
    return x, weight, offsets, grad


def rows_dequantized(x, offsets):
    q, scale = ops.quantize_1x128(x, offsets)
    return ops.dequantize(q, scale).double()


def columns_dequantized(x):
    """Along the rows of one expert: one scale per column and 128 rows."""
    padded = torch.cat([x, x.new_zeros(-x.shape[0] % 128, x.shape[1])])
    q, scale = ops.quantize_1x128(padded.T.contiguous())
    return ops.dequantize(q, scale).double().T[: x.shape[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("loads", "unused"), [([130], 0), ([5, 0, 127, 1], 9), ([0, 0], 0), ([0, 300, 0], 4)])
def test_product_and_gradients(loads, unused, dtype):
    x, weight, offsets, grad = make(loads, unused=unused, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    y = ops.linear_fp8(x, weight, offsets)
    y.backward(grad)
    codes, _, scale = ops.quantize_128x128(weight.detach().unflatten(0, (len(loads), -1)))
    w_ENK = ops.dequantize(codes, scale).double()
    x_RK, g_RN = rows_dequantized(x.detach(), offsets), rows_dequantized(grad, offsets)
    expected, dx, dw = torch.zeros(y.shape).double(), torch.zeros(x.shape).double(), torch.zeros_like(w_ENK)
    for e, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        part = slice(start, stop)
        expected[part], dx[part] = x_RK[part] @ w_ENK[e].T, g_RN[part] @ w_ENK[e]
        dw[e] = columns_dequantized(grad[part]).T @ columns_dequantized(x.detach()[part])
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for got, want in ((y, expected), (x.grad, dx), (weight.grad, dw.flatten(0, 1))):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathering_and_gating_change_no_bit(dtype):
    idx = torch.randint(-1, 3, (90, 2), generator=torch.Generator().manual_seed(1))
    _, offsets, *maps = ops.route_map(idx, 3)
    x, weight, _, _ = make([90, 0, 0], k=128, dtype=dtype)
    results = []
    for fused in (False, True):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        if fused:
            h = ops.linear_fp8(x, weight, offsets, maps=maps)
            y = ops.linear_fp8(h, weight[:, :128], offsets, gated=True)
        else:
            h = ops.linear_fp8(ops.permute(x, *maps), weight, offsets)
            y = ops.linear_fp8(ops.swiglu(h, offsets), weight[:, :128], offsets)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gathering_and_gating_need_what_they_need():
    x, weight, offsets, _ = make([4])
    maps = torch.zeros(4, 1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(OpError, match="maps need the offsets"):
        ops.linear_fp8(x, weight, maps=maps)
    with pytest.raises(OpError, match="exclude each other"):
        ops.linear_fp8(torch.cat([x, x], 1), weight, offsets, maps, gated=True)
    with pytest.raises(OpError, match=r"must be \[R, 2K\]"):
        ops.linear_fp8(x, weight, offsets, gated=True)


def test_a_weight_already_in_float8_gives_the_same_bits():
    x, weight, offsets, grad = make([5, 200])
    results = []
    for w in (weight, None):
        if w is None:
            codes, _, scale = ops.quantize_128x128(weight.unflatten(0, (2, -1)))
            w = ops.Float8Weight(codes.flatten(0, 1), scale.flatten(0, 1), weight.dtype)
        tokens, parameter = x.clone().requires_grad_(), torch.nn.Parameter(w)
        y = ops.linear_fp8(tokens, parameter, offsets)
        y.backward(grad)
        assert parameter.grad.dtype == weight.dtype and type(parameter.grad) is torch.Tensor
        results.append((y, tokens.grad, parameter.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(NotImplementedError, match="takes part in linear_fp8 only"):
        torch.nn.Parameter(w) + 1


@pytest.mark.parametrize(("rows", "columns"), [(256, 100), (200, 128)])
def test_shapes_that_do_not_fit(rows, columns):
    with pytest.raises(OpError, match="multiples of 128"):
        ops.linear_fp8(torch.zeros(3, columns), torch.zeros(rows, columns))
