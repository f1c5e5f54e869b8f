"""The gated activation between an expert's two matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, once_differentiable


def swiglu(
    x: Tensor,
    offsets: Tensor | None = None,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + up_offset), where gate and up are the two halves of x's columns.

    Args:
        x: float32 or bfloat16 [R, 2I].
        offsets: int64 [E+1]; rows from offsets[E] on are not read and come out zero. None: all rows are used.
        limit: gate is clamped to at most `limit`, up to +-limit (GPT-OSS model card); None: no clamp.

    Returns:
        [R, I] in the dtype of x.
    """
    return torch.ops.xtuner.swiglu(x, offsets, alpha, limit, up_offset)


def _fake(x: Tensor, offsets: Tensor | None, alpha: float, limit: float | None, up_offset: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def _swiglu(x: Tensor, offsets: Tensor | None, alpha: float, limit: float | None, up_offset: float) -> Tensor:
    out = _fake(x, offsets, alpha, limit, up_offset)
    _C.swiglu(x, offsets, alpha, limit, up_offset, out, torch.get_num_threads())
    return out


def _swiglu_bwd(
    dout: Tensor, x: Tensor, offsets: Tensor | None, alpha: float, limit: float | None, up_offset: float
) -> Tensor:
    dx = torch.empty_like(x)
    _C.swiglu_bwd(dout, x, offsets, alpha, limit, up_offset, dx, torch.get_num_threads())
    return dx


def _setup(ctx, inputs, output) -> None:
    x, offsets, *ctx.scalars = inputs
    ctx.save_for_backward(x, offsets)


def _backward(ctx, grad: Tensor):
    x, offsets = ctx.saved_tensors
    return torch.ops.xtuner.swiglu_bwd(grad.contiguous(), x, offsets, *ctx.scalars), None, None, None, None


_SCALARS = "Tensor? offsets, float alpha, float? limit, float up_offset"
define(f"swiglu(Tensor x, {_SCALARS}) -> Tensor", _swiglu, _fake)
define(f"swiglu_bwd(Tensor dout, Tensor x, {_SCALARS}) -> Tensor", _swiglu_bwd, lambda dout, x, *_: torch.empty_like(x))
autograd("swiglu", _backward, _setup)
once_differentiable("swiglu_bwd")
