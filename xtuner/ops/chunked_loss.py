"""Any loss on the tokens' log-probabilities behind the head, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from xtuner.ops._lib import OpError
from xtuner.ops.linear_cross_entropy import by_parts, losses_

PerTokenFn = Callable[[Tensor, dict[str, Tensor]], Tensor]


def chunked_loss(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, per_token_fn: PerTokenFn, extras: Mapping[str, Tensor]
) -> Tensor:
    """Sum over tokens of per_token_fn(log softmax(hidden @ head_weight^T)[label], extras), in float32.

    As in `linear_cross_entropy`, which is this with -log_prob * loss_weight, both gradients are made on the way: the
    loss's gradient at a token's log-probability is a weight on its cross-entropy.

    Args:
        hidden: float32 or bfloat16 [T, D].
        head_weight: [V, D] in the dtype of hidden.
        labels: int64 [T], each in [0, V).
        per_token_fn: maps float32 [t] log-probabilities and the same t rows of `extras` to t losses, each of which
            depends on its own token alone. Made of torch operators; called on a part of the tokens at a time.
        extras: tensors [T, …], constants to the loss.

    Returns:
        float32 scalar.

    Raises:
        OpError: an extra that has not a row per token, or per_token_fn returns another shape than [t].
    """
    for name, value in extras.items():
        if value.shape[:1] != hidden.shape[:1]:
            raise OpError(f"chunked_loss: extras[{name!r}] must be [T={hidden.shape[0]}, …], got {list(value.shape)}")
    live = torch.is_grad_enabled()
    wanted = live and hidden.requires_grad, live and head_weight.requires_grad
    return _ChunkedLoss.apply(hidden, head_weight, labels, per_token_fn, dict(extras), wanted)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, per_token_fn, extras, wanted) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)

        def differentiate(logits: Tensor, part: slice) -> None:
            ones, log_probs = torch.ones_like(losses[part]), torch.empty_like(losses[part])
            losses_(logits, labels[part], ones, False, log_probs)
            log_probs.neg_()
            rows = {name: value[part] for name, value in extras.items()}
            loss, weights = _at(per_token_fn, log_probs, rows, any(wanted))
            losses[part] = loss
            if any(wanted):
                losses_(logits, labels[part], weights.neg_(), True, log_probs)

        ctx.save_for_backward(*by_parts(hidden, weight, differentiate, *wanted))
        ctx.wanted = wanted
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        scaled = [g * grad if w else None for g, w in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
        return *scaled, None, None, None, None


def _at(per_token_fn: PerTokenFn, log_probs: Tensor, rows: dict[str, Tensor], differentiable: bool):
    """The tokens' losses, and where wanted their gradient at the log-probabilities."""
    with torch.set_grad_enabled(differentiable):
        point = log_probs.detach().requires_grad_(differentiable)
        loss = per_token_fn(point, rows)
        if loss.shape != log_probs.shape:
            raise OpError(
                f"chunked_loss: per_token_fn must return a loss per token, {list(log_probs.shape)}, "
                f"got {list(loss.shape)}"
            )
        return loss.detach(), torch.autograd.grad(loss.sum(), point)[0] if differentiable else None
