"""Gather each token's expert rows back and sum them."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, once_differentiable


def unpermute(y: Tensor, row_of: Tensor, src: Tensor, probs: Tensor | None = None) -> Tensor:
    """out[t] = sum over k of probs[t, k] * y[row_of[t, k]], in float32 and in the order of k; dropped choices add 0.

    Args:
        y: float32 or bfloat16 [R, H].
        row_of, src: int32 [T, K] and [R], from `route_map`.
        probs: float32 [T, K], or None for weights of one. Differentiable.

    Returns:
        [T, H] in the dtype of y.
    """
    return torch.ops.xtuner.unpermute(y, row_of, src, probs)


def _fake(y: Tensor, row_of: Tensor, src: Tensor, probs: Tensor | None) -> Tensor:
    return y.new_empty(row_of.shape[0], y.shape[1])


def _unpermute(y: Tensor, row_of: Tensor, src: Tensor, probs: Tensor | None) -> Tensor:
    out = _fake(y, row_of, src, probs)
    _C.unpermute(y, row_of, probs, out, torch.get_num_threads())
    return out


def _fake_bwd(dout: Tensor, y: Tensor, row_of: Tensor, src: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(probs)


def _unpermute_bwd(dout: Tensor, y: Tensor, row_of: Tensor, src: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    dy, dprobs = _fake_bwd(dout, y, row_of, src, probs)
    _C.unpermute_bwd(dout, y, src, row_of, probs, dy, dprobs, torch.get_num_threads())
    return dy, dprobs


def _setup(ctx, inputs, output) -> None:
    y, row_of, src, probs = inputs
    # Without weights the gradient is a plain permute, which does not need y.
    ctx.save_for_backward(y if probs is not None else None, row_of, src, probs)


def _backward(ctx, grad: Tensor):
    y, row_of, src, probs = ctx.saved_tensors
    grad = grad.contiguous()
    if probs is None:
        return torch.ops.xtuner.permute(grad, row_of, src), None, None, None
    dy, dprobs = torch.ops.xtuner.unpermute_bwd(grad, y, row_of, src, probs)
    return dy, None, None, dprobs


define("unpermute(Tensor y, Tensor row_of, Tensor src, Tensor? probs) -> Tensor", _unpermute, _fake)
define(
    "unpermute_bwd(Tensor dout, Tensor y, Tensor row_of, Tensor src, Tensor probs) -> (Tensor, Tensor)",
    _unpermute_bwd,
    _fake_bwd,
)
autograd("unpermute", _backward, _setup)
once_differentiable("unpermute_bwd")
