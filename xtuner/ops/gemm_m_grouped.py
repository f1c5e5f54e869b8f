"""One matrix product per expert, over ragged groups of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define


def gemm_m_grouped(a: Tensor, b: Tensor, offsets: Tensor, trans_b: bool = True) -> Tensor:
    """Rows offsets[e]:offsets[e+1] of the result are those of `a` times b[e] (transposed with `trans_b`).

    Args:
        a: float32 or bfloat16 [R, Kd]; rows from offsets[E] on are never read.
        b: [E, N, Kd] with trans_b, else [E, Kd, N]; dtype of a.
        offsets: int64 [E+1].

    Returns:
        [R, N] in the dtype of a, accumulated in float32; unused rows are zero.
    """
    return torch.ops.xtuner.gemm_m_grouped(a, b, offsets, trans_b)


def _fake(a: Tensor, b: Tensor, offsets: Tensor, trans_b: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1] if trans_b else b.shape[2])


def _gemm_m_grouped(a: Tensor, b: Tensor, offsets: Tensor, trans_b: bool) -> Tensor:
    out = _fake(a, b, offsets, trans_b)
    _C.gemm_m_grouped(a, b, offsets, trans_b, out, torch.get_num_threads())
    return out


def _setup(ctx, inputs, output) -> None:
    a, b, offsets, ctx.trans_b = inputs
    ctx.save_for_backward(a, b, offsets)


def _backward(ctx, grad: Tensor):
    a, b, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    da = db = None
    if ctx.needs_input_grad[0]:
        da = torch.ops.xtuner.gemm_m_grouped(grad, b, offsets, not ctx.trans_b)
    if ctx.needs_input_grad[1]:
        rows, columns = (grad, a) if ctx.trans_b else (a, grad)
        db = torch.ops.xtuner.gemm_k_grouped(rows, columns, offsets, b.dtype)
    return da, db, None, None


define("gemm_m_grouped(Tensor a, Tensor b, Tensor offsets, bool trans_b) -> Tensor", _gemm_m_grouped, _fake)
autograd("gemm_m_grouped", _backward, _setup)
