"""Bring tokens to the rows of their experts on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, not_differentiable
from xtuner.ops.ep import ROUTE_SCHEMA, EpGroup, EpRoute, group_of
from xtuner.ops.quantize import row_scale_ld


def ep_dispatch(x: Tensor, route: EpRoute, group: EpGroup) -> Tensor:
    """Rows of this rank's experts, from the tokens of all ranks: `permute` across the group. Collective.

    Args:
        x: float32 or bfloat16 [T, H].
        route: from `ep_prepare`.

    Returns:
        [R, H] in the dtype of x, with R = route.capacity or the rows that come; those from route.offsets[-1] on are
        zero.

    Raises:
        OpError: a rank that does not come in time, named with what it owes.
    """
    return torch.ops.xtuner.ep_dispatch(x, *route, group.id)


def _num_rows(offsets: Tensor | None, capacity: int | None) -> int:
    return int(offsets[-1]) if capacity is None else capacity


def _fake_rows(capacity: int | None) -> int:
    return torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity


def _fake(x: Tensor, offsets, counts: Tensor, dest: Tensor, capacity: int | None, group: int) -> Tensor:
    return x.new_empty(_fake_rows(capacity), x.shape[1])


def _ep_dispatch(x: Tensor, offsets, counts: Tensor, dest: Tensor, capacity: int | None, group: int) -> Tensor:
    ep = group_of(group)
    area = ep.next_area()
    out = area.empty((_num_rows(offsets, capacity), x.shape[1]), x.dtype)
    _C.ep_dispatch(x, None, counts, dest, ep.peers, out, None, torch.get_num_threads())
    return area.keep(out)


def ep_dispatch_quantized(q: Tensor, scale: Tensor, route: EpRoute, group: EpGroup) -> tuple[Tensor, Tensor]:
    """`ep_dispatch` of float8 rows with their scales: half the bytes of bfloat16 travel. Without gradient.

    Args:
        q, scale: float8 [T, H] and float32 [H/128, ld], from `quantize_1x128`.

    Returns:
        q [R, H] and scale float32 [H/128, R up to a multiple of 4]: what quantizing the dispatched rows would give.
    """
    return torch.ops.xtuner.ep_dispatch_quantized(q, scale, *route, group.id)


def _fake_quantized(q: Tensor, scale: Tensor, offsets, counts, dest, capacity: int | None, group: int):
    rows = _fake_rows(capacity)
    return q.new_empty(rows, q.shape[1]), scale.new_empty(scale.shape[0], row_scale_ld(rows))


def _ep_dispatch_quantized(q: Tensor, scale: Tensor, offsets, counts, dest, capacity: int | None, group: int):
    ep, rows = group_of(group), _num_rows(offsets, capacity)
    area = ep.next_area()
    out = area.empty((rows, q.shape[1]), q.dtype)
    out_scale = area.empty((scale.shape[0], row_scale_ld(rows)), scale.dtype)
    _C.ep_dispatch(q, scale, counts, dest, ep.peers, out, out_scale, torch.get_num_threads())
    return area.keep(out), area.keep(out_scale)


def _setup(ctx, inputs, output) -> None:
    _, _, counts, dest, _, ctx.group = inputs
    ctx.save_for_backward(counts, dest)


def _backward(ctx, grad: Tensor):
    # In eager mode nobody writes to a gradient that has been used; a compiler may reuse its memory at once.
    in_place = not torch.compiler.is_compiling()
    dx = torch.ops.xtuner.ep_combine(grad.contiguous(), *ctx.saved_tensors, None, ctx.group, in_place)
    return dx, None, None, None, None, None


_ROUTE = f"Tensor? offsets, {ROUTE_SCHEMA}, SymInt? capacity, int group"
define(f"ep_dispatch(Tensor x, {_ROUTE}) -> Tensor", _ep_dispatch, _fake)
define(
    f"ep_dispatch_quantized(Tensor q, Tensor scale, {_ROUTE}) -> (Tensor, Tensor)",
    _ep_dispatch_quantized,
    _fake_quantized,
)
autograd("ep_dispatch", _backward, _setup)
not_differentiable("ep_dispatch_quantized", "float8 has no gradient; the layer that quantizes defines one")
