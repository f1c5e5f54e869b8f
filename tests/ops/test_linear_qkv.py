"""The projections to queries, keys and values, all three at once, against their oracle."""

import sys

import pytest
import torch

from tests.ops.test_ops import check, randn
from xtuner import ops
from xtuner.ops import OpError, reference

MODULE = sys.modules["xtuner.ops.linear_qkv"]  # the package exports the function under this name
SHAPES = [(37, 24, 40, 8), (0, 8, 6, 3), (129, 1, 33, 7), (5, 40, 1, 1), (200, 300, 127, 64)]  # T, D, Nq, Nk = Nv


@pytest.mark.parametrize("in_core", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, width, num_q, num_kv", SHAPES)
def test_linear_qkv(monkeypatch, tokens, width, num_q, num_kv, dtype, in_core):
    monkeypatch.setattr(MODULE, "runs_in_core", lambda device, dtype, num_rows: in_core)
    inputs = [randn(n, width, dtype=dtype, seed=i) / 4 for i, n in enumerate((tokens, num_q, num_kv, num_kv))]
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    outs, expected = ops.linear_qkv(*inputs), reference.linear_qkv(*exact)
    grads = [randn(*out.shape, dtype=dtype, seed=9 + i) / 16 for i, out in enumerate(outs)]
    for out, e in zip(outs, expected, strict=True):
        assert out.dtype == dtype
        check(out, e, dtype)
    torch.autograd.backward(outs, grads)
    torch.autograd.backward(expected, [g.double() for g in grads])
    for x, e in zip(inputs, exact, strict=True):
        check(x.grad, e.grad, dtype)  # in bfloat16 the gradient of x is rounded three times


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_on_one_side_only(wanted):
    inputs = [randn(n, 8, seed=n) for n in (9, 6, 4, 3)]
    inputs[wanted].requires_grad_()
    sum(out.sum() for out in ops.linear_qkv(*inputs)).backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(4)]


def test_output_without_gradient():
    x, wq, wk, wv = (randn(n, 8, seed=n).requires_grad_() for n in (9, 6, 4, 3))
    ops.linear_qkv(x, wq, wk, wv)[1].sum().backward()
    torch.testing.assert_close(x.grad, wk.detach().sum(0).expand(9, 8))
    assert not wq.grad.any() and not wv.grad.any()


def test_width_that_does_not_fit():
    with pytest.raises(OpError, match="wk"):
        ops.linear_qkv(randn(9, 8), randn(6, 8), randn(4, 7), randn(3, 8))
