"""Losses on log-probabilities against the oracle in float64, over the edges of the parts that logits are made in."""

import sys

import pytest
import torch

from tests.ops.test_linear_cross_entropy import inputs
from tests.ops.test_ops import check
from xtuner import ops
from xtuner.ops import OpError, reference

MODULE = sys.modules["xtuner.ops.linear_cross_entropy"]  # the package exports the function under this name


def clipped_ratio(log_probs, extras):
    """PPO's objective (Schulman et al. 2017, eq. 7), whose gradient vanishes where the ratio is clipped."""
    ratio = (log_probs - extras["old"].to(log_probs.dtype)).exp()
    advantage = extras["advantage"].to(log_probs.dtype)
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def extras_for(tokens):
    generator = torch.Generator().manual_seed(8)
    return {name: torch.randn(tokens, generator=generator) - shift for name, shift in (("old", 3), ("advantage", 0))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 127, 128, 129, 300])
def test_loss_and_gradients(monkeypatch, tokens, dtype):
    monkeypatch.setattr(MODULE, "_LOGITS_AT_A_TIME", 0)  # 128 rows at a time
    hidden, weight, labels, _ = inputs(tokens, 16, 37, dtype)
    extras = extras_for(tokens)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    ours = [x.requires_grad_() for x in (hidden, weight)]
    loss = ops.chunked_loss(*ours, labels, clipped_ratio, extras)
    expected = reference.chunked_loss(*exact, labels, clipped_ratio, extras)
    assert loss.dtype == torch.float32 and loss.shape == ()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5  # bfloat16 logits round by 2^-8 of up to four
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:  # rounding moves a ratio over the edge of the clip, where the gradient jumps
        (loss / 3).backward()
        (expected / 3).backward()
        for x, e in zip(ours, exact, strict=True):
            check(x.grad, e.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_one_of_them(dtype):
    *matrices, labels, loss_weights = inputs(300, 16, 37, dtype)
    matrices = [x.requires_grad_() for x in matrices]
    fixed = ops.linear_cross_entropy(*matrices, labels, loss_weights)
    free = ops.chunked_loss(*matrices, labels, lambda lp, e: -lp * e["weights"], {"weights": loss_weights})
    torch.testing.assert_close(free, fixed)
    for a, b in zip(torch.autograd.grad(free, matrices), torch.autograd.grad(fixed, matrices), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_made(wanted):
    *matrices, labels, _ = inputs(20, 8, 11, torch.float32)
    matrices = [x.requires_grad_(w) for x, w in zip(matrices, wanted, strict=True)]
    loss = ops.chunked_loss(*matrices, labels, clipped_ratio, extras_for(20))
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert [x.grad is not None for x in matrices] == list(wanted)
    with torch.no_grad():
        assert torch.equal(ops.chunked_loss(*matrices, labels, clipped_ratio, extras_for(20)), loss)


def test_bad_input_names_the_argument():
    *matrices, labels, _ = inputs(4, 8, 11, torch.float32)
    with pytest.raises(OpError, match=r"extras\['old'\] must be \[T=4, …\], got \[3\]"):
        ops.chunked_loss(*matrices, labels, clipped_ratio, extras_for(3))
    with pytest.raises(OpError, match=r"per_token_fn must return a loss per token, \[4\], got \[\]"):
        ops.chunked_loss(*matrices, labels, lambda lp, e: lp.sum(), {})
