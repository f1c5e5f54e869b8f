"""One product of transposed row groups per expert: the weight gradient of `gemm_m_grouped`."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define


def gemm_k_grouped(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype | None = None,
    maps: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """out[e] = a_e^T b_e over the rows offsets[e]:offsets[e+1]; zero for an expert without rows.

    Args:
        a, b: float32 or bfloat16 [R, M] and [R, N]; rows from offsets[E] on are never read.
        offsets: int64 [E+1].
        out_dtype: float32 or bfloat16; None is the dtype of a.
        maps: row_of [T, K] and src [R] from `route_map`: then `b` is [T, N], gathered as in `gemm_m_grouped`.

    Returns:
        [E, M, N], accumulated in float32.
    """
    return torch.ops.xtuner.gemm_k_grouped(a, b, offsets, out_dtype or a.dtype, *(maps or (None, None)))


def gemm_k_grouped_(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, beta: float = 1.0) -> Tensor:
    """out[e] = beta * out[e] + a_e^T b_e in place, beta 0 or 1: accumulation straight into a gradient buffer."""
    torch.ops.xtuner.gemm_k_grouped_(out, a, b, offsets, beta)
    return out


def _fake(a, b, offsets, out_dtype, row_of, src) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, a.shape[1], b.shape[1], dtype=out_dtype)


def _gemm_k_grouped(a, b, offsets, out_dtype, row_of, src) -> Tensor:
    out = _fake(a, b, offsets, out_dtype, row_of, src)
    per_token = 1 if src is None else row_of.shape[1]
    threads = torch.get_num_threads()
    _C.gemm_k_grouped(a, b, offsets, 0.0, src=src, num_experts_per_tok=per_token, out=out, num_threads=threads)
    return out


def _accumulate(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, beta: float) -> None:
    _C.gemm_k_grouped(a, b, offsets, beta, out=out, num_threads=torch.get_num_threads())


def _setup(ctx, inputs, output) -> None:
    a, b, offsets, _, row_of, src = inputs
    ctx.save_for_backward(a, b, offsets, row_of, src)


def _backward(ctx, grad: Tensor):
    a, b, offsets, row_of, src = ctx.saved_tensors
    grad_EMN = grad.contiguous().to(a.dtype)
    da = db = None
    if ctx.needs_input_grad[0]:
        da = torch.ops.xtuner.gemm_m_grouped(b, grad_EMN, offsets, True, None, row_of, src)
    if ctx.needs_input_grad[1]:
        db = torch.ops.xtuner.gemm_m_grouped(a, grad_EMN, offsets, False, None, None, None)
        if src is not None:
            db = torch.ops.xtuner.unpermute(db, row_of, src, None)
    return da, db, None, None, None, None


define(
    "gemm_k_grouped(Tensor a, Tensor b, Tensor offsets, ScalarType out_dtype, Tensor? row_of, Tensor? src) -> Tensor",
    _gemm_k_grouped,
    _fake,
)
define(
    "gemm_k_grouped_(Tensor(a!) out, Tensor a, Tensor b, Tensor offsets, float beta) -> ()",
    _accumulate,
    lambda out, a, b, offsets, beta: None,
)
autograd("gemm_k_grouped", _backward, _setup)
