"""RMSNorm and rotary against their oracles in float64, and the ways they are called."""

import pytest
import torch

from tests.ops.test_ops import compare, randn
from xtuner import ops
from xtuner.ops import OpError, reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 24), (5, 3, 17), (0, 8), (1, 1), (300, 33), (129, 128)])
def test_rms_norm(shape, dtype):
    weight = 1 + randn(shape[-1], dtype=dtype, seed=2) / 4
    compare("rms_norm", [randn(*shape, dtype=dtype), weight], [1e-3], dtype)


def angles(tokens, half, dtype):
    table = torch.rand(tokens, half, generator=torch.Generator().manual_seed(4)) * 6
    return [table.cos().to(dtype), table.sin().to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 4, 24), (5, 1, 2), (0, 2, 8), (129, 2, 34)])
def test_rotary(shape, dtype):
    tables = angles(shape[0], shape[2] // 2, dtype)
    x = randn(*shape, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, expected = ops.rotary(x, *tables), reference.rotary(exact, *(t.double() for t in tables))
    tolerance = {"rtol": 2**-7, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    grad = randn(*shape, dtype=dtype, seed=9)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 4, 24), (5, 1, 2), (0, 2, 8), (129, 3, 34)])
def test_rms_norm_rotary(shape, dtype):
    tables, weight = angles(shape[0], shape[2] // 2, dtype), 1 + randn(shape[2], dtype=dtype, seed=2) / 4
    inputs = [randn(*shape, dtype=dtype).requires_grad_(), weight.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = ops.rms_norm_rotary(*inputs, *tables, 1e-3)
    expected = reference.rms_norm_rotary(*exact, *(t.double() for t in tables), 1e-3)
    loose = dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-6 if loose else 1e-5, atol=2e-2 if loose else 1e-5)
    grad = randn(*shape, dtype=dtype, seed=9)
    ours = torch.autograd.grad(out, inputs, grad)
    steps = torch.autograd.grad(ops.rotary(ops.rms_norm(*inputs, 1e-3), *tables), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, steps, strict=True))
    wanted = torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(ours[0].double(), wanted[0], rtol=2**-5 if loose else 1e-4, atol=0.1 if loose else 1e-4)
    torch.testing.assert_close(ours[1].double(), wanted[1], rtol=2**-5 if loose else 1e-4, atol=0.5 if loose else 1e-3)


def test_inputs_that_are_not_contiguous():
    x, weight = randn(8, 3, 20)[..., :16], randn(32)[::2]
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), ops.rms_norm(x.contiguous(), weight.clone(), 1e-6))
    tables = angles(8, 8, torch.float32)
    assert torch.equal(ops.rotary(x, *tables), ops.rotary(x.contiguous(), *tables))


def test_formula_where_the_core_has_no_kernel():
    from importlib import import_module

    for name, arguments in (
        ("rms_norm", (randn(9, 16), randn(16, seed=2), 1e-3)),
        ("rms_norm_rotary", (randn(9, 2, 16), randn(16, seed=2), *angles(9, 8, torch.float32), 1e-3)),
        ("rotary", (randn(9, 2, 16), *angles(9, 8, torch.float32), True)),
    ):
        module = import_module(f"xtuner.ops.{name}")
        expected = module._in_torch(*arguments)
        torch.testing.assert_close(getattr(torch.ops.xtuner, name)(*arguments), expected, rtol=1e-5, atol=1e-5)
    x, weight, dout = randn(200, 16), randn(16, seed=2), randn(200, 16, seed=3)
    inverse = torch.rand(200)
    norm = import_module("xtuner.ops.rms_norm")
    ours = torch.ops.xtuner.rms_norm_bwd(dout, x, weight, inverse)
    for a, b in zip(ours, norm._in_torch_bwd(dout, x, weight, inverse), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    both, heads = import_module("xtuner.ops.rms_norm_rotary"), (x.view(50, 4, 16), weight)
    arguments = (dout.view(50, 4, 16), *heads, *angles(50, 8, torch.float32), inverse.view(50, 4))
    ours = torch.ops.xtuner.rms_norm_rotary_bwd(*arguments)
    for a, b in zip(ours, both._in_torch_bwd(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_compiles_whole():
    def f(x, weight, cos, sin):
        return ops.rotary(ops.rms_norm(x, weight, 1e-6), cos, sin).square().sum()

    x, weight, tables = randn(9, 2, 8).requires_grad_(), randn(8).requires_grad_(), angles(9, 4, torch.float32)
    expected = torch.autograd.grad(f(x, weight, *tables), (x, weight))
    g = torch.compile(f, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(g(x, weight, *tables), (x, weight))
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input_names_the_argument():
    with pytest.raises(OpError, match=r"rms_norm: weight must be float32 \[D=8\], got float32 \[7\]"):
        ops.rms_norm(randn(4, 8), randn(7), 1e-6)
    with pytest.raises(OpError, match=r"rotary: x must have an even number of features per head, got 7"):
        ops.rotary(randn(4, 1, 7), randn(4, 3), randn(4, 3))
    with pytest.raises(OpError, match=r"rotary: cos must be float32 \[T=4, D/2=4\], got bfloat16 \[4, 4\]"):
        ops.rotary(randn(4, 1, 8), randn(4, 4).bfloat16(), randn(4, 4))
