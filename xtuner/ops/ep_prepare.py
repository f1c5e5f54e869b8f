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
        capacity: R, rows for the experts of this rank: choices that find none left are dropped, but counted. None: as
            many rows as come.

    Raises:
        OpError: an index outside [-1, num_experts); a rank that does not come in time. On a GPU both are noted for
            `raise_faults`, here and in the other ops of the group.
    """
    return EpRoute(*torch.ops.xtuner.ep_prepare(topk_idx, num_experts, group.id, capacity), capacity)


def _fake(topk_idx: Tensor, num_experts: int, group: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    world = group_of(group).world_size
    offsets = topk_idx.new_empty(num_experts // world + 1, dtype=torch.int64)
    counts = topk_idx.new_empty((world, num_experts), dtype=torch.int32)
    return offsets, counts, topk_idx.new_empty((*topk_idx.shape, 2), dtype=torch.int32)


def _ep_prepare(topk_idx: Tensor, num_experts: int, group: int, capacity: int | None):
    offsets, counts, dest = _fake(topk_idx, num_experts, group, capacity)
    size = _C.ep_prepare_workspace_size(topk_idx, num_experts)
    workspace = topk_idx.new_empty(size, dtype=torch.int32) if size else None
    peers = group_of(group).peers
    _C.ep_prepare(topk_idx, capacity, peers, counts, dest, offsets, torch.get_num_threads(), workspace)
    return offsets, counts, dest


define(
    "ep_prepare(Tensor topk_idx, int num_experts, int group, SymInt? capacity) -> (Tensor, Tensor, Tensor)",
    _ep_prepare,
    _fake,
)
