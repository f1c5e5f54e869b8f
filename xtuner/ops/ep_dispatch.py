"""Bring tokens to the rows of their experts on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define
from xtuner.ops.ep import ROUTE_SCHEMA, EpGroup, EpRoute, group_of, row_bytes


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


def _setup(ctx, inputs, output) -> None:
    _, *maps, ctx.group = inputs
    ctx.save_for_backward(*maps)


def _backward(ctx, grad: Tensor):
    dx = torch.ops.xtuner.ep_combine(grad.contiguous(), *ctx.saved_tensors, None, ctx.group)
    return dx, None, None, None, None, None, None


define(f"ep_dispatch(Tensor x, {ROUTE_SCHEMA}, int group) -> Tensor", _ep_dispatch, _fake)
autograd("ep_dispatch", _backward, _setup)
