"""Gather each token's expert rows from all ranks and sum them."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, once_differentiable
from xtuner.ops.ep import ROUTE_SCHEMA, EpGroup, EpRoute, group_of, row_bytes


def ep_combine(y: Tensor, route: EpRoute, group: EpGroup, probs: Tensor | None = None) -> Tensor:
    """out[t] = sum over k of probs[t, k] * the row of choice (t, k), wherever that is. Collective.

    In float32 and in the order of k: the bits are those of `unpermute` on one rank that holds all experts.

    Args:
        y: float32 or bfloat16 [R, H], rows of this rank's experts.
        route: from `ep_prepare`.
        probs: float32 [T, K], or None for weights of one. Differentiable.

    Returns:
        [T, H] in the dtype of y.

    Raises:
        OpError: a rank that does not come in time, named with what it owes.
    """
    return torch.ops.xtuner.ep_combine(y, *route.maps, probs, group.id)


def _fake(y: Tensor, counts, tokens, dest: Tensor, slot, origin, probs: Tensor | None, group: int) -> Tensor:
    return y.new_empty(dest.shape[0], y.shape[1])


def _ep_combine(y: Tensor, *args) -> Tensor:
    *maps, probs, group = args
    out = _fake(y, *args)
    memory = group_of(group).memory_for(maps, row_bytes(y))
    _C.ep_combine(y, maps, memory, probs, out, torch.get_num_threads())
    return out


def _fake_bwd(dout: Tensor, y: Tensor, counts, tokens, dest, slot, origin, probs: Tensor, group: int):
    return torch.empty_like(y), torch.empty_like(probs)


def _ep_combine_bwd(dout: Tensor, y: Tensor, *args) -> tuple[Tensor, Tensor]:
    *maps, probs, group = args
    dy, dprobs = _fake_bwd(dout, y, *args)
    memory = group_of(group).memory_for(maps, row_bytes(y))
    _C.ep_combine_bwd(dout, y, maps, memory, probs, dy, dprobs, torch.get_num_threads())
    return dy, dprobs


def _setup(ctx, inputs, output) -> None:
    y, *maps, probs, ctx.group = inputs
    # Without weights the gradient is a plain dispatch, which does not need y.
    ctx.save_for_backward(y if probs is not None else None, *maps, probs)


def _backward(ctx, grad: Tensor):
    y, *maps, probs = ctx.saved_tensors
    grad = grad.contiguous()
    if probs is None:
        dy, dprobs = torch.ops.xtuner.ep_dispatch(grad, *maps, ctx.group), None
    else:
        dy, dprobs = torch.ops.xtuner.ep_combine_bwd(grad, y, *maps, probs, ctx.group)
    return dy, None, None, None, None, None, dprobs, None


define(f"ep_combine(Tensor y, {ROUTE_SCHEMA}, Tensor? probs, int group) -> Tensor", _ep_combine, _fake)
define(
    f"ep_combine_bwd(Tensor dout, Tensor y, {ROUTE_SCHEMA}, Tensor probs, int group) -> (Tensor, Tensor)",
    _ep_combine_bwd,
    _fake_bwd,
)
autograd("ep_combine", _backward, _setup)
once_differentiable("ep_combine_bwd")
