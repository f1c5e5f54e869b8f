"""Backward through an expert's activation and second matrix, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import define, once_differentiable


def gemm_m_grouped_dswiglu(
    dy: Tensor,
    b: Tensor,
    offsets: Tensor,
    x: Tensor,
    weights: Tensor | None = None,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of y = weights * gemm_m_grouped(swiglu(x), b, offsets) and its gradient dy (as in SonicMoE, arXiv 2512.14080).

    Args:
        dy: float32 or bfloat16 [R, D].
        b: [E, D, I] in the dtype of dy.
        offsets: int64 [E+1]; rows from offsets[E] on are never read and come out zero.
        x: [R, 2I] in the dtype of dy, gate columns, then up columns.
        weights: float32 [R], of each row's result; None: all are 1.
        alpha, limit, up_offset: as for `swiglu`.

    Returns:
        The gradient [R, 2I] of x; weights * swiglu(x) [R, I], of which gemm_k_grouped(dy, act, offsets) is the gradient
        of b; the gradient float32 [R] of the weights, or [0] without weights. Without weights the first two have the
        bits of the separate ops.
    """
    return torch.ops.xtuner.gemm_m_grouped_dswiglu(dy, b, offsets, x, weights, alpha, limit, up_offset)


def _fake(dy, b, offsets, x, weights, alpha, limit, up_offset) -> tuple[Tensor, Tensor, Tensor]:
    dweights = x.new_empty(0, dtype=torch.float32) if weights is None else torch.empty_like(weights)
    return torch.empty_like(x), x.new_empty(x.shape[0], b.shape[2]), dweights


def _gemm_m_grouped_dswiglu(dy, b, offsets, x, weights, alpha, limit, up_offset) -> tuple[Tensor, Tensor, Tensor]:
    dx, act, dweights = _fake(dy, b, offsets, x, weights, alpha, limit, up_offset)
    given = {}
    if weights is not None:
        workspace = weights.new_empty(_C.gemm_m_grouped_dswiglu_workspace_size(x))
        given = {"weights": weights, "dweights": dweights, "workspace": workspace}
    scalars = {"alpha": alpha, "limit": limit, "up_offset": up_offset}
    _C.gemm_m_grouped_dswiglu(
        dy, b, offsets, x, **given, **scalars, dx=dx, act=act, num_threads=torch.get_num_threads()
    )
    return dx, act, dweights


define(
    "gemm_m_grouped_dswiglu(Tensor dy, Tensor b, Tensor offsets, Tensor x, Tensor? weights, float alpha, float? limit,"
    " float up_offset) -> (Tensor, Tensor, Tensor)",
    _gemm_m_grouped_dswiglu,
    _fake,
)
once_differentiable("gemm_m_grouped_dswiglu")
