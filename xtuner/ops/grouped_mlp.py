"""SwiGLU experts: two grouped products that keep only what lies between the first of them and the activation."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner.ops.ep import EpGroup


def grouped_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    offsets: Tensor,
    maps: tuple[Tensor, Tensor] | None = None,
    group: EpGroup | None = None,
) -> Tensor:
    """gemm_m_grouped(gemm_m_grouped_swiglu(x, w13, offsets, maps=maps), w2, offsets), with the same bits forward and
    backward, but the activation is not kept for backward, where `gemm_m_grouped_dswiglu` makes it again.

    Args:
        x: float32 or bfloat16 [R, D], or with `maps` [T, D], as for `gemm_m_grouped`.
        w13: [E, 2I, D], gate rows, then up rows.
        w2: [E, D, I].
        offsets: int64 [E+1].
        group: the result, and the gradient of x, go to the memory that its ranks share.

    Returns:
        [R, D]; unused rows are zero.
    """
    return _GroupedMLP.apply(x, w13, w2, offsets, *(maps or (None, None)), group and group.id)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w13, w2, offsets, row_of, src, group) -> Tensor:
        ops = torch.ops.xtuner
        act, gate_up = ops.gemm_m_grouped_swiglu(x, w13, offsets, None, row_of, src, 1.0, None, 0.0)
        ctx.group = group
        ctx.save_for_backward(x, w13, w2, offsets, row_of, src, gate_up)
        return ops.gemm_m_grouped(act, w2, offsets, True, None, None, None, group)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, w13, w2, offsets, row_of, src, gate_up = ctx.saved_tensors
        ops, dy = torch.ops.xtuner, dy.contiguous()
        dx = dw13 = dw2 = None
        dgate_up, act, _ = ops.gemm_m_grouped_dswiglu(dy, w2, offsets, gate_up, None, 1.0, None, 0.0)
        if ctx.needs_input_grad[2]:
            dw2 = ops.gemm_k_grouped(dy, act, offsets, w2.dtype, None, None)
        del act, gate_up
        if ctx.needs_input_grad[0]:
            dx = ops.gemm_m_grouped(dgate_up, w13, offsets, False, None, None, None, ctx.group)
            if src is not None:
                dx = ops.unpermute(dx, row_of, src, None)
        if ctx.needs_input_grad[1]:
            dw13 = ops.gemm_k_grouped(dgate_up, x, offsets, w13.dtype, row_of, src)
        return dx, dw13, dw2, None, None, None, None
