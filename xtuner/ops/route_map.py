"""Where each (token, choice) goes once rows are grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import define


def route_map(
    topk_idx: Tensor, num_experts: int, capacity: int | None = None, align: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stable counting sort of the routing choices.

    Args:
        topk_idx: int32 or int64 [T, K], expert of each choice; -1 drops it.
        capacity: rows R of the grouped buffers; None is enough for any routing.
        align: each expert's rows start at a multiple of this.

    Returns:
        counts int32[E]; offsets int64[E+1], where offsets[E] rows are used; row_of int32[T, K], the row of each choice
        or -1; src int32[R], the flat choice t*K+k that fills a row, or -1 where none does.

    Raises:
        OpError: an index outside [-1, num_experts), or more rows than `capacity`; on a GPU it is
            noted for `raise_faults`.
    """
    if capacity is None:
        capacity = topk_idx.numel() + num_experts * (align - 1)
    return torch.ops.xtuner.route_map(topk_idx, num_experts, capacity, align)


def _outputs(topk_idx: Tensor, num_experts: int, capacity: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return topk_idx.new_empty(shape, dtype=dtype)

    return new(num_experts), new(num_experts + 1, dtype=torch.int64), new(*topk_idx.shape), new(capacity)


def _route_map(topk_idx: Tensor, num_experts: int, capacity: int, align: int):
    outputs = _outputs(topk_idx, num_experts, capacity, align)
    size = _C.route_map_workspace_size(topk_idx, num_experts)
    workspace = topk_idx.new_empty(size, dtype=torch.int32) if size else None
    _C.route_map(topk_idx, align, *outputs, torch.get_num_threads(), workspace)
    return outputs


define(
    "route_map(Tensor topk_idx, int num_experts, int capacity, int align) -> (Tensor, Tensor, Tensor, Tensor)",
    _route_map,
    _outputs,
)
