"""The dense product in the core against its oracle, and the rule that decides when it is used."""

import sys

import pytest
import torch
import torch.nn.functional as F

from tests.ops.test_ops import check, randn
from xtuner import ops
from xtuner.ops import OpError, reference

MODULE = sys.modules["xtuner.ops.linear"]  # the package exports the function under this name
SHAPES = [((37,), 24, 40), ((2, 9), 17, 5), ((), 8, 6), ((0,), 8, 6), ((129,), 1, 33), ((5,), 40, 1), ((1,), 128, 127)]


@pytest.fixture
def in_core(monkeypatch):
    """Every product in the core, whatever this processor can do."""
    monkeypatch.setattr(MODULE, "runs_in_core", lambda device, dtype, num_rows: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows, width, num_out", SHAPES)
def test_linear(in_core, rows, width, num_out, with_bias, dtype):
    inputs = [randn(*rows, width, dtype=dtype) / 4, randn(num_out, width, dtype=dtype, seed=2) / 4]
    inputs += [randn(num_out, dtype=dtype, seed=3)] * with_bias
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    out, expected = ops.linear(*inputs), reference.linear(*exact)
    assert out.dtype == dtype and out.shape == expected.shape
    check(out, expected, dtype)
    grad = randn(*out.shape, dtype=dtype, seed=9)
    out.backward(grad)
    expected.backward(grad.double())
    for x, e in zip(inputs, exact, strict=True):
        check(x.grad, e.grad, dtype)


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_on_one_side_only(in_core, wanted):
    inputs = [randn(9, 8), randn(6, 8, seed=2)]
    inputs[wanted].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.linear(*inputs)
    assert [t.shape for t in kept] == [inputs[1 - wanted].shape], "a side is kept for the other's gradient alone"
    out.sum().backward()
    assert inputs[wanted].grad is not None and inputs[1 - wanted].grad is None


def test_inputs_that_are_not_contiguous(in_core):
    x, weight = randn(8, 9).T.requires_grad_(), randn(8, 6, seed=2).T.requires_grad_()
    out = ops.linear(x, weight)
    torch.testing.assert_close(out, x @ weight.T)
    out.sum().backward()  # an expanded gradient
    torch.testing.assert_close(x.grad, weight.sum(0).expand(9, 8))


def test_compiles_whole(in_core):
    x, weight = randn(9, 8).requires_grad_(), randn(6, 8, seed=2).requires_grad_()
    compiled = torch.compile(lambda x, w: ops.linear(x, w).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(x, weight).backward()
    expected = x.detach().clone().requires_grad_()
    F.linear(expected, weight.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_rule(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has_bf16 in (True, False):
        monkeypatch.setattr(MODULE, "_TORCH_HAS_BF16", has_bf16)
        assert MODULE.runs_in_core(cpu, torch.bfloat16, 1) is not has_bf16
        assert not MODULE.runs_in_core(cuda, torch.bfloat16, 512)
    assert MODULE.runs_in_core(cpu, torch.float32, 8) and not MODULE.runs_in_core(cpu, torch.float32, 7)
    assert not MODULE.runs_in_core(cuda, torch.float32, 512)


def test_bad_input_names_the_argument(in_core):
    with pytest.raises(OpError, match=r"linear: x \[4, 7\] must end in the width of weight \[6, 8\]"):
        ops.linear(randn(4, 7), randn(6, 8))
    with pytest.raises(OpError, match="bfloat16"):
        ops.linear(randn(4, 8), randn(6, 8).bfloat16())
