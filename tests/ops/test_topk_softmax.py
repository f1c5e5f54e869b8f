"""The router's choice against its oracle in float64, and the ways it is called."""

from importlib import import_module

import pytest
import torch

from tests.ops.test_ops import randn
from xtuner import ops
from xtuner.ops import OpError, reference


def compare(logits, k, normalise, choice_bias=None, topk_idx=None):
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = ops.topk_softmax(ours, k, normalise, choice_bias, topk_idx)
    wanted = reference.topk_softmax(exact, k, normalise, choice_bias, topk_idx)
    assert torch.equal(got.idx, wanted[1]) and torch.equal(got.counts.double(), wanted[2])
    for a, b in zip((got.weights, *got[2:]), (wanted[0], *wanted[2:]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=1e-6)
    grads = [randn(*got.weights.shape, seed=2), randn(*got.prob_sum.shape, seed=3), torch.tensor(0.3)]
    torch.autograd.backward([got.weights, got.prob_sum, got.z_sum], grads)
    torch.autograd.backward([wanted[0], wanted[3], wanted[4]], [g.double() for g in grads])
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shape", [(37, 5, 2), (0, 4, 2), (1, 1, 1), (129, 32, 4), (70, 33, 33), (3, 256, 8)])
def test_topk_softmax(shape, normalise):
    tokens, experts, k = shape
    logits = 2 * randn(tokens, experts)
    compare(logits, k, normalise)
    compare(logits, k, normalise, choice_bias=randn(experts, seed=5) / experts)
    compare(logits, k, normalise, topk_idx=torch.randint(0, experts, (tokens, k)))


def test_of_equals_the_first_is_chosen():
    assert ops.topk_softmax(torch.zeros(3, 7), 4, True).idx.tolist() == [[0, 1, 2, 3]] * 3
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    assert ops.topk_softmax(logits, 4, True).idx.tolist() == [[1, 3, 2, 4]]


def test_a_token_with_nan_has_valid_choices_and_nan_weights():
    logits = randn(3, 6)
    logits[1, 4] = float("nan")
    out = ops.topk_softmax(logits, 2, True)
    assert out.idx[1].tolist() == [0, 1] and out.weights[1].isnan().all()
    assert out.weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("with_grad", [(0,), (3,), (4,), (0, 3)])
def test_gradient_of_some_of_the_results(with_grad):
    logits, exact = randn(9, 6).requires_grad_(), randn(9, 6).double().requires_grad_()
    got, wanted = ops.topk_softmax(logits, 2, True), reference.topk_softmax(exact, 2, True)
    for i in with_grad:
        shape = got[i].shape
        (got[i] * torch.linspace(-1, 2, got[i].numel()).view(shape)).sum().backward(retain_graph=True)
        (wanted[i] * torch.linspace(-1, 2, got[i].numel()).view(shape)).sum().backward(retain_graph=True)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=2e-6)


def test_formula_where_the_core_has_no_kernel():
    module = import_module("xtuner.ops.topk_softmax")
    logits, bias = randn(20, 7), torch.rand(7)
    for arguments in ((None, None, 3, True), (bias, None, 3, False), (None, torch.randint(0, 7, (20, 3)), 3, True)):
        expected = torch.ops.xtuner.topk_softmax(logits, *arguments)
        for a, b in zip(module._in_torch(logits, *arguments), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        given = randn(20, 3), randn(7), torch.tensor(0.3), *(expected[i] for i in (2, 3, 1)), arguments[3]
        ours = torch.ops.xtuner.topk_softmax_bwd(*given)
        torch.testing.assert_close(module._in_torch_bwd(*given), ours, rtol=1e-5, atol=1e-5)


def test_bad_input_names_the_argument():
    with pytest.raises(OpError, match=r"topk_softmax: topk_idx\[1, 0\] must be in \[0, E=4\), got 4"):
        ops.topk_softmax(randn(2, 4), 1, True, topk_idx=torch.tensor([[0], [4]]))
    with pytest.raises(OpError, match=r"topk_softmax: K must be in \[1, E=4\], got 5"):
        ops.topk_softmax(randn(2, 4), 5, True)
    with pytest.raises(OpError, match=r"topk_softmax: choice_bias must be float32 \[E=4\], got float32 \[3\]"):
        ops.topk_softmax(randn(2, 4), 1, True, randn(3))
    with pytest.raises(OpError, match=r"topk_softmax: logits must be float32"):
        ops.topk_softmax(randn(2, 4).bfloat16(), 1, True)
