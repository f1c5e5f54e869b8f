"""Bring tokens to the rows of their experts on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, not_differentiable
from xtuner.ops.ep import ROUTE_SCHEMA, EpGroup, EpRoute, group_of, row_bytes
from xtuner.ops.quantize import row_scale_ld


def ep_dispatch(x: Tensor, route: EpRoute, group: EpGroup) -> Tensor:
    """Rows of this rank's experts, from the tokens of all ranks: `permute` across the group. Collective.

    Args:
        x: float32 or bfloat16 [T, H].
        route: from `ep_prepare`.

    Returns:
        [R, H] in the dtype of x; rows from route.offsets[-1] on are zero.

    Raises:
        OpError: a rank that does not come in time, named with what it owes.
    """
    return torch.ops.xtuner.ep_dispatch(x, *route.maps, group.id)


def _fake(x: Tensor, counts: Tensor, tokens: Tensor, dest: Tensor, slot: Tensor, origin: Tensor, group: int) -> Tensor:
    return x.new_empty(origin.shape[0], x.shape[1])


def _ep_dispatch(x: Tensor, *args) -> Tensor:
    *maps, group = args
    out = _fake(x, *args)
    memory = group_of(group).memory_for(maps, row_bytes(x))
    _C.ep_dispatch(x, None, maps, memory, out, None, torch.get_num_threads())
    return out


def ep_dispatch_quantized(q: Tensor, scale: Tensor, route: EpRoute, group: EpGroup) -> tuple[Tensor, Tensor]:
    """`ep_dispatch` of float8 rows with their scales: half the bytes of bfloat16 travel. Without gradient.

    Args:
        q, scale: float8 [T, H] and float32 [H/128, ld], from `quantize_1x128`.

    Returns:
        q [R, H] and scale float32 [H/128, R up to a multiple of 4]: what quantizing the dispatched rows would give.
    """
    return torch.ops.xtuner.ep_dispatch_quantized(q, scale, *route.maps, group.id)


def _fake_quantized(q: Tensor, scale: Tensor, counts, tokens, dest, slot, origin: Tensor, group: int):
    rows = origin.shape[0]
    return q.new_empty(rows, q.shape[1]), scale.new_empty(scale.shape[0], row_scale_ld(rows))


def _ep_dispatch_quantized(q: Tensor, scale: Tensor, *args) -> tuple[Tensor, Tensor]:
    *maps, group = args
    out, out_scale = _fake_quantized(q, scale, *args)
    memory = group_of(group).memory_for(maps, row_bytes(q) + 4 * scale.shape[0] + 4)
    _C.ep_dispatch(q, scale, maps, memory, out, out_scale, torch.get_num_threads())
    return out, out_scale


def _setup(ctx, inputs, output) -> None:
    _, *maps, ctx.group = inputs
    ctx.save_for_backward(*maps)


def _backward(ctx, grad: Tensor):
    dx = torch.ops.xtuner.ep_combine(grad.contiguous(), *ctx.saved_tensors, None, ctx.group)
    return dx, None, None, None, None, None, None


define(f"ep_dispatch(Tensor x, {ROUTE_SCHEMA}, int group) -> Tensor", _ep_dispatch, _fake)
define(
    f"ep_dispatch_quantized(Tensor q, Tensor scale, {ROUTE_SCHEMA}, int group) -> (Tensor, Tensor)",
    _ep_dispatch_quantized,
    _fake_quantized,
)
autograd("ep_dispatch", _backward, _setup)
not_differentiable("ep_dispatch_quantized", "float8 has no gradient; the layer that quantizes defines one")
