"""One matrix product per expert, over ragged groups of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define
from xtuner.ops.ep import EpGroup, group_of


def gemm_m_grouped(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    trans_b: bool = True,
    bias: Tensor | None = None,
    maps: tuple[Tensor, Tensor] | None = None,
    group: EpGroup | None = None,
) -> Tensor:
    """Rows offsets[e]:offsets[e+1] of the result are those of `a` times b[e] (transposed with `trans_b`).

    Args:
        a: float32 or bfloat16 [R, Kd]; rows from offsets[E] on are never read.
        b: [E, N, Kd] with trans_b, else [E, Kd, N]; dtype of a.
        offsets: int64 [E+1].
        bias: [E, N] in the dtype of a, added to the rows of each expert.
        maps: row_of [T, K] and src [R] from `route_map`: then `a` is [T, Kd] and its tokens are gathered into rows on
            the way, bit for bit as by `permute`, without that copy.
        group: the result goes to the memory that its ranks share, so that `ep_combine` need not copy it there.

    Returns:
        [R, N] in the dtype of a, accumulated in float32; unused rows are zero.
    """
    return torch.ops.xtuner.gemm_m_grouped(a, b, offsets, trans_b, bias, *(maps or (None, None)), group and group.id)


def gemm_m_grouped_swiglu(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    maps: tuple[Tensor, Tensor] | None = None,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    group: EpGroup | None = None,
) -> Tensor:
    """swiglu(gemm_m_grouped(a, b, offsets, True, bias, maps)) in one pass: [R, N/2], the same bits.

    b holds gate rows, then up rows: [E, 2I, Kd]. alpha, limit and up_offset as for `swiglu`.
    group: the gradient of `a` goes to the memory that its ranks share, where `ep_dispatch` takes it from.
    """
    args = (alpha, limit, up_offset, group and group.id)
    return torch.ops.xtuner.gemm_m_grouped_swiglu(a, b, offsets, bias, *(maps or (None, None)), *args)[0]


def _new_rows(a: Tensor, b: Tensor, trans_b: bool, src: Tensor | None) -> Tensor:
    return a.new_empty((a if src is None else src).shape[0], b.shape[1 if trans_b else 2])


def _gather(row_of: Tensor | None, src: Tensor | None) -> dict:
    return {} if src is None else {"src": src, "num_experts_per_tok": row_of.shape[1]}


def _fake(a, b, offsets, trans_b, bias, row_of, src, group=None) -> Tensor:
    return _new_rows(a, b, trans_b, src)


def _gemm_m_grouped(a, b, offsets, trans_b, bias, row_of, src, group=None) -> Tensor:
    if group is None:
        out = _new_rows(a, b, trans_b, src)
    else:
        out = group_of(group).empty(((a if src is None else src).shape[0], b.shape[1 if trans_b else 2]), a.dtype)
    given = {"bias": bias, **_gather(row_of, src)}
    _C.gemm_m_grouped(a, b, offsets, trans_b, **given, out=out, num_threads=torch.get_num_threads())
    return out


def _fake_swiglu(a, b, offsets, bias, row_of, src, alpha, limit, up_offset, group=None) -> tuple[Tensor, Tensor]:
    out = _new_rows(a, b, True, src)
    return out.new_empty(out.shape[0], out.shape[1] // 2), out


def _gemm_m_grouped_swiglu(a, b, offsets, bias, row_of, src, alpha, limit, up_offset, group=None):
    act, out = _fake_swiglu(a, b, offsets, bias, row_of, src, alpha, limit, up_offset, group)
    given = {"bias": bias, **_gather(row_of, src), "act": act}
    scalars = {"alpha": alpha, "limit": limit, "up_offset": up_offset}
    _C.gemm_m_grouped(a, b, offsets, True, **given, **scalars, out=out, num_threads=torch.get_num_threads())
    return act, out


def _setup(ctx, inputs, output) -> None:
    a, b, offsets, ctx.trans_b, bias, row_of, src, _ = inputs
    ctx.group = None
    ctx.has_bias = bias is not None
    ctx.save_for_backward(a, b, offsets, row_of, src)


def _setup_swiglu(ctx, inputs, output) -> None:
    a, b, offsets, bias, row_of, src, *ctx.scalars, ctx.group = inputs
    ctx.trans_b, ctx.has_bias = True, bias is not None
    ctx.set_materialize_grads(False)  # nobody but the backward itself asks for the product before the activation
    ctx.save_for_backward(a, b, offsets, row_of, src, output[1])


def _input_gradients(ctx, grad: Tensor, a, b, offsets, row_of, src, wanted) -> tuple[Tensor | None, ...]:
    """Of a, b and bias, from that of the product."""
    da = db = dbias = None
    if wanted[0]:
        da = torch.ops.xtuner.gemm_m_grouped(grad, b, offsets, not ctx.trans_b, None, None, None, ctx.group)
        if src is not None:
            da = torch.ops.xtuner.unpermute(da, row_of, src, None)
    if wanted[1]:
        if ctx.trans_b:
            db = torch.ops.xtuner.gemm_k_grouped(grad, a, offsets, b.dtype, row_of, src)
        else:
            rows = a if src is None else torch.ops.xtuner.permute(a, row_of, src)
            db = torch.ops.xtuner.gemm_k_grouped(rows, grad, offsets, b.dtype, None, None)
    if ctx.has_bias and wanted[2]:
        ones = grad.new_ones(grad.shape[0], 1)
        dbias = torch.ops.xtuner.gemm_k_grouped(ones, grad, offsets, grad.dtype, None, None).squeeze(1)
    return da, db, dbias


def _backward(ctx, grad: Tensor):
    wanted = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[4])
    da, db, dbias = _input_gradients(ctx, grad.contiguous(), *ctx.saved_tensors, wanted)
    return da, db, None, None, dbias, None, None, None


def _backward_swiglu(ctx, dact: Tensor | None, dout: Tensor | None):
    *inputs, out = ctx.saved_tensors
    grad = dout.contiguous() if dout is not None else None
    if dact is not None:
        through_act = torch.ops.xtuner.swiglu_bwd(dact.contiguous(), out, inputs[2], *ctx.scalars)
        grad = through_act if grad is None else grad + through_act
    if grad is None:
        return (None,) * 10
    wanted = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
    da, db, dbias = _input_gradients(ctx, grad, *inputs, wanted)
    return da, db, None, dbias, None, None, None, None, None, None


_OPTIONS = "Tensor? bias, Tensor? row_of, Tensor? src"
define(
    f"gemm_m_grouped(Tensor a, Tensor b, Tensor offsets, bool trans_b, {_OPTIONS}, int? group=None) -> Tensor",
    _gemm_m_grouped,
    _fake,
)
autograd("gemm_m_grouped", _backward, _setup)
define(
    f"gemm_m_grouped_swiglu(Tensor a, Tensor b, Tensor offsets, {_OPTIONS}, float alpha, float? limit, float up_offset,"
    " int? group=None) -> (Tensor, Tensor)",
    _gemm_m_grouped_swiglu,
    _fake_swiglu,
)
autograd("gemm_m_grouped_swiglu", _backward_swiglu, _setup_swiglu)
