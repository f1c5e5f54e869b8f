"""Head and cross-entropy in one against the oracle in float64, over the edges of the parts that logits are made in."""

import sys

import pytest
import torch

from tests.ops.test_ops import check, randn
from xtuner import ops
from xtuner.ops import OpError, reference

MODULE = sys.modules["xtuner.ops.linear_cross_entropy"]  # the package exports the function under this name


def inputs(tokens, width, vocab, dtype):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    loss_weights = torch.rand(tokens, generator=generator).masked_fill(torch.arange(tokens) % 5 == 3, 0.0)
    return randn(tokens, width, dtype=dtype) / 4, randn(vocab, width, dtype=dtype, seed=2) / 4, labels, loss_weights


@pytest.mark.parametrize("in_core", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 127, 128, 129, 300])
def test_loss_and_gradients(monkeypatch, tokens, dtype, in_core):
    monkeypatch.setattr(MODULE, "_LOGITS_AT_A_TIME", 0)  # 128 rows at a time
    monkeypatch.setattr(MODULE, "runs_in_core", lambda device, dtype, num_rows: in_core)
    hidden, weight, labels, loss_weights = inputs(tokens, 16, 37, dtype)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    ours = [x.requires_grad_() for x in (hidden, weight)]
    loss = ops.linear_cross_entropy(*ours, labels, loss_weights)
    expected = reference.linear_cross_entropy(*exact, labels, loss_weights.double())
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    (loss / 3).backward()
    (expected / 3).backward()
    for x, e in zip(ours, exact, strict=True):
        check(x.grad, e.grad, dtype)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_made(wanted):
    *matrices, labels, loss_weights = inputs(20, 8, 11, torch.float32)
    matrices = [x.requires_grad_(w) for x, w in zip(matrices, wanted, strict=True)]
    out = torch.ops.xtuner.linear_cross_entropy(*matrices, labels, loss_weights, *wanted)
    assert [x.numel() > 0 for x in out[1:]] == list(wanted)
    loss = ops.linear_cross_entropy(*matrices, labels, loss_weights)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert [x.grad is not None for x in matrices] == list(wanted)
    with torch.no_grad():
        assert torch.equal(ops.linear_cross_entropy(*matrices, labels, loss_weights), loss)


@pytest.mark.parametrize("name", ["losses_", "_losses_in_torch_"])
def test_losses_of_a_part(name):
    hidden, weight, labels, loss_weights = inputs(20, 8, 11, torch.float32)
    logits, losses = hidden @ weight.T, torch.empty(20)
    expected = logits.clone()
    getattr(MODULE, name)(logits, labels, loss_weights, True, losses)
    log_probs = expected.log_softmax(-1)
    expected_losses = -log_probs[torch.arange(20), labels] * loss_weights
    one_hot = torch.nn.functional.one_hot(labels, 11)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(logits, (log_probs.exp() - one_hot) * loss_weights[:, None])


def test_compiles_whole():
    *matrices, labels, loss_weights = inputs(20, 8, 11, torch.float32)
    matrices = [x.requires_grad_() for x in matrices]
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*matrices, labels, loss_weights) / 7, matrices)
    expected = torch.autograd.grad(ops.linear_cross_entropy(*matrices, labels, loss_weights) / 7, matrices)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input_names_the_argument():
    hidden, weight, labels, loss_weights = inputs(4, 8, 11, torch.float32)
    with pytest.raises(OpError, match=r"hidden must be \[T, D\] and weight \[V, D\] of one dtype"):
        ops.linear_cross_entropy(hidden, weight[:, :7], labels, loss_weights)
    with pytest.raises(OpError, match=r"labels\[0\] must be in \[0, V=11\), got 11"):
        ops.linear_cross_entropy(hidden, weight, labels.fill_(11), loss_weights)
