"""Where each token goes when experts are spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import define
from xtuner.ops.ep import EpGroup, EpRoute, group_of


def ep_prepare(topk_idx: Tensor, num_experts: int, group: EpGroup, capacity: int | None = None) -> EpRoute:
    """The ranks tell each other how many rows each expert gets. Collective. Expert e lives on rank e // (E / W).

    Args:
        topk_idx: int32 or int64 [T, K], expert of each choice in [0, num_experts), -1 drops it. T may differ by rank.
        num_experts: E, a multiple of the group's W ranks.
        capacity: R, rows for the experts of this rank; None: as many as come, which the host reads.

    Raises:
        OpError: an index outside [-1, num_experts); more rows than `capacity`; a rank that does not come in time.
    """
    return EpRoute(*torch.ops.xtuner.ep_prepare(topk_idx, num_experts, group.id, capacity))


def _outputs(topk_idx: Tensor, num_experts: int, world: int) -> tuple[Tensor, ...]:
    tokens, k = topk_idx.shape

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return topk_idx.new_empty(shape, dtype=dtype)

    offsets = new(num_experts // world + 1, dtype=torch.int64)
    return offsets, new(world, num_experts), new(world, world), new(tokens, k, 2), new(tokens, world)


def _fake(topk_idx: Tensor, num_experts: int, group: int, capacity: int | None):
    outputs = _outputs(topk_idx, num_experts, group_of(group).world_size)
    if capacity is None:
        capacity = torch.library.get_ctx().new_dynamic_size()
    return *outputs, topk_idx.new_empty(capacity, dtype=torch.int32)


def _ep_prepare(topk_idx: Tensor, num_experts: int, group: int, capacity: int | None):
    memory, threads = group_of(group).memory, torch.get_num_threads()
    outputs = _outputs(topk_idx, num_experts, group_of(group).world_size)
    offsets, counts, tokens, dest, slot = outputs
    _C.ep_prepare(topk_idx, memory, counts, tokens, dest, slot, offsets, threads)
    rows = int(offsets[-1]) if capacity is None else capacity
    origin = topk_idx.new_empty(rows, dtype=torch.int32)
    _C.ep_prepare_rows(memory, counts, tokens, offsets, origin, threads)
    return *outputs, origin


define(
    "ep_prepare(Tensor topk_idx, int num_experts, int group, SymInt? capacity)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ep_prepare,
    _fake,
)
