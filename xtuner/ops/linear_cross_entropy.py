"""The head and the cross-entropy behind it, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import OpError, autograd, define
from xtuner.ops.linear import runs_in_core

# Logits held at a time, and the fewest rows of them that still make a good product.
_LOGITS_AT_A_TIME, _FEWEST_ROWS = 1 << 22, 128


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    """Sum over tokens of loss_weight * -log softmax(hidden @ weight^T)[label], in float32.

    Both gradients are made on the way, while a part's logits are at hand, so that no product is done twice; backward
    only scales them.

    Args:
        hidden: float32 or bfloat16 [T, D].
        weight: [V, D] in the dtype of hidden.
        labels: int64 [T], each in [0, V).
        loss_weights: float32 [T]. Not differentiable.

    Returns:
        float32 scalar.
    """
    live = torch.is_grad_enabled()
    wanted = live and hidden.requires_grad, live and weight.requires_grad
    return torch.ops.xtuner.linear_cross_entropy(hidden, weight, labels, loss_weights, *wanted)[0]


def _fake(hidden, weight, labels, loss_weights, want_dhidden: bool, want_dweight: bool):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if want_dhidden else (0,)),
        weight.new_empty(weight.shape if want_dweight else (0,)),
    )


def _linear_cross_entropy(hidden, weight, labels, loss_weights, want_dhidden: bool, want_dweight: bool):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise OpError(
            f"linear_cross_entropy: hidden must be [T, D] and weight [V, D] of one dtype, got "
            f"{hidden.dtype} {list(hidden.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    losses = torch.empty_like(loss_weights)
    gradient = want_dhidden or want_dweight

    def differentiate(logits: Tensor, part: slice) -> None:
        losses_(logits, labels[part], loss_weights[part], gradient, losses[part])

    gradients = by_parts(hidden, weight, differentiate, want_dhidden, want_dweight)
    return losses.sum(), *gradients


def by_parts(
    hidden: Tensor,
    weight: Tensor,
    differentiate: Callable[[Tensor, slice], None],
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Both gradients of a loss on hidden @ weight^T, which exists a part of the tokens at a time; unwanted ones empty.

    Args:
        differentiate: given the logits of a part of the tokens, puts the loss's gradient in their place.
    """
    _, dhidden, _ = _fake(hidden, weight, None, None, want_dhidden, False)
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if want_dweight else None
    hidden, weight, num_tokens = hidden.contiguous(), weight.contiguous(), hidden.shape[0]
    rows = rows_at_a_time(weight.shape[0])
    for start in range(0, num_tokens, rows):
        part = slice(start, min(start + rows, num_tokens))
        logits = _product(hidden[part], weight, transposed=True)
        differentiate(logits, part)
        if want_dhidden:
            dhidden[part] = _product(logits, weight, transposed=False)
        if want_dweight:
            _add_outer(dweight, logits, hidden[part])
    return dhidden, dweight.to(weight.dtype) if want_dweight else weight.new_empty(0)


def rows_at_a_time(vocab_size: int) -> int:
    """Tokens whose logits are held together."""
    return max(_FEWEST_ROWS, _LOGITS_AT_A_TIME // max(1, vocab_size))


def losses_(logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool, losses: Tensor) -> None:
    """Fill `losses`; with `gradient` the logits become the gradient of their sum."""
    if logits.device.type == "cpu":
        _C.cross_entropy(logits, labels, weights, gradient, losses, torch.get_num_threads())
    else:
        _losses_in_torch_(logits, labels, weights, gradient, losses)


def _losses_in_torch_(logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool, losses: Tensor) -> None:
    """Where the core has no kernel."""
    log_probs = logits.float().log_softmax(-1)
    losses.copy_(-log_probs.gather(1, labels[:, None])[:, 0] * weights)
    if gradient:
        probs = log_probs.exp_().scatter_add_(1, labels[:, None], -torch.ones_like(weights)[:, None])
        logits.copy_(probs.mul_(weights[:, None]))


def _product(a: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    if not runs_in_core(a.device, a.dtype, a.shape[0]):
        return a @ (weight.T if transposed else weight)
    return torch.ops.xtuner.linear(a, weight) if transposed else torch.ops.xtuner.linear_dgrad(a, weight)


def _add_outer(dweight: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """dweight += dlogits^T hidden, in float32."""
    if runs_in_core(dlogits.device, dlogits.dtype, dlogits.shape[0]):
        one_group = torch.tensor([0, dlogits.shape[0]])
        _C.gemm_k_grouped(dlogits, hidden, one_group, 1.0, out=dweight[None], num_threads=torch.get_num_threads())
    elif dlogits.dtype == torch.float32:
        dweight.addmm_(dlogits.T, hidden)
    else:
        dweight.add_(dlogits.T @ hidden)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # else zeros as large as both gradients
    ctx.save_for_backward(output[1], output[2])
    ctx.wanted = inputs[4:]


def _backward(ctx, grad: Tensor, *_):
    # A scalar tensor multiplies in float32 and does not widen what it scales.
    scaled = [g * grad if w else None for g, w in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    return *scaled, None, None, None, None


define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor loss_weights, bool want_dhidden, "
    "bool want_dweight) -> (Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    _fake,
)
autograd("linear_cross_entropy", _backward, _setup)
