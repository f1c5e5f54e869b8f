"""Gather each token's expert rows from all ranks and sum them."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, once_differentiable
from xtuner.ops.ep import ROUTE_SCHEMA, EpGroup, EpRoute, group_of


def ep_combine(y: Tensor, route: EpRoute, group: EpGroup, probs: Tensor | None = None) -> Tensor:
    """out[t] = sum over k of probs[t, k] * the row of choice (t, k), wherever that is. Collective.

    In float32 and in the order of k: the bits are those of `unpermute` on one rank that holds all experts.

    Args:
        y: float32 or bfloat16 [R, H], rows of this rank's experts. On the CPU, where it is in the group's memory
            (`EpGroup.empty`) the other ranks read it there, and nobody may write to it before this rank's next op of
            the group has ended; elsewhere, on a GPU and under torch.compile it is copied first.
        route: from `ep_prepare`.
        probs: float32 [T, K], or None for weights of one. Differentiable.

    Returns:
        [T, H] in the dtype of y.

    Raises:
        OpError: a rank that does not come in time, named with what it owes.
    """
    in_place = not torch.compiler.is_compiling()
    return torch.ops.xtuner.ep_combine(y, route.counts, route.dest, probs, group.id, in_place)


def _fake(y: Tensor, counts: Tensor, dest: Tensor, probs: Tensor | None, group: int, in_place: bool) -> Tensor:
    return y.new_empty(dest.shape[0], y.shape[1])


def _ep_combine(y: Tensor, counts: Tensor, dest: Tensor, probs: Tensor | None, group: int, in_place: bool) -> Tensor:
    ep = group_of(group)
    out = _fake(y, counts, dest, probs, group, in_place)
    area = ep.next_area()
    shared = area.share(y) if in_place else area.empty(y.shape, y.dtype).copy_(y)
    _C.ep_combine(shared, counts, dest, ep.peers, probs, out, torch.get_num_threads())
    return out


def _fake_bwd(dout: Tensor, y: Tensor, counts, dest, probs: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(probs)


def _ep_combine_bwd(dout: Tensor, y: Tensor, counts, dest, probs: Tensor, group: int) -> tuple[Tensor, Tensor]:
    ep = group_of(group)
    area = ep.next_area()
    dy, dprobs = area.empty(y.shape, y.dtype), torch.empty_like(probs)
    _C.ep_combine_bwd(dout, area.share(y), counts, dest, ep.peers, probs, dy, dprobs, torch.get_num_threads())
    return area.keep(dy), dprobs


def _setup(ctx, inputs, output) -> None:
    y, counts, dest, probs, ctx.group, _ = inputs
    ctx.rows = y.shape[0]
    # Without weights the gradient is a plain dispatch, which does not need y.
    ctx.save_for_backward(y if probs is not None else None, counts, dest, probs)


def _backward(ctx, grad: Tensor):
    y, counts, dest, probs = ctx.saved_tensors
    grad = grad.contiguous()
    if probs is None:
        dy, dprobs = torch.ops.xtuner.ep_dispatch(grad, None, counts, dest, ctx.rows, ctx.group), None
    else:
        dy, dprobs = torch.ops.xtuner.ep_combine_bwd(grad, y, counts, dest, probs, ctx.group)
    return dy, None, None, dprobs, None, None


define(
    f"ep_combine(Tensor y, {ROUTE_SCHEMA}, Tensor? probs, int group, bool in_place) -> Tensor", _ep_combine, _fake
)
define(
    f"ep_combine_bwd(Tensor dout, Tensor y, {ROUTE_SCHEMA}, Tensor probs, int group) -> (Tensor, Tensor)",
    _ep_combine_bwd,
    _fake_bwd,
)
autograd("ep_combine", _backward, _setup)
once_differentiable("ep_combine_bwd")
