"""Copy tokens into rows grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define


def permute(x: Tensor, row_of: Tensor, src: Tensor) -> Tensor:
    """out[row_of[t, k]] = x[t]; rows nothing maps to are zero.

    Args:
        x: float32 or bfloat16 [T, H].
        row_of, src: int32 [T, K] and [R], each other's inverse, from `route_map`.

    Returns:
        [R, H] in the dtype of x.
    """
    return torch.ops.xtuner.permute(x, row_of, src)


def _fake(x: Tensor, row_of: Tensor, src: Tensor) -> Tensor:
    return x.new_empty(src.shape[0], x.shape[1])


def _permute(x: Tensor, row_of: Tensor, src: Tensor) -> Tensor:
    out = _fake(x, row_of, src)
    _C.permute(x, row_of, src, out, torch.get_num_threads())
    return out


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad: Tensor):
    return torch.ops.xtuner.unpermute(grad.contiguous(), *ctx.saved_tensors, None), None, None


define("permute(Tensor x, Tensor row_of, Tensor src) -> Tensor", _permute, _fake)
autograd("permute", _backward, _setup)
