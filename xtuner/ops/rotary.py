"""Rotation of queries and keys by their positions (Su et al. 2021), in the half-split layout."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature i together with i + D/2 of each head, by the token's angles.

    Args:
        x: float32 or bfloat16 [T, H, D].
        cos, sin: [T, D/2] in the dtype of x. Not differentiable.

    Returns:
        As x.
    """
    return torch.ops.xtuner.rotary(x, cos, sin, False)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if x.device.type != "cpu":
        return _in_torch(x, cos, sin, back)
    out = _fake(x, cos, sin, back)
    _C.rotary(x.contiguous(), cos.contiguous(), sin.contiguous(), back, out, torch.get_num_threads())
    return out


def _in_torch(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Where the core has no kernel."""
    (first, second), cos, sin = x.chunk(2, dim=-1), cos[:, None], sin[:, None]
    sign = -1 if back else 1
    turned = (first * cos).addcmul_(second, sin, value=-sign), (second * cos).addcmul_(first, sin, value=sign)
    return torch.cat(turned, dim=-1)


def _setup(ctx, inputs, output) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad: Tensor):
    """The gradient of a rotation is the rotation back, so nothing of x is kept."""
    return torch.ops.xtuner.rotary(grad, *ctx.saved_tensors, not ctx.back), None, None, None


define("rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _rotary, _fake)
autograd("rotary", _backward, _setup)
