"""Tokens to experts that live on other ranks, and back: the token dispatchers of expert parallelism.

Both give the bits of the local dispatcher: rows of an expert follow (rank, token, k), results are summed in k order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner import ops


class FusedRows(NamedTuple):
    x: Tensor
    offsets: Tensor
    route: ops.EpRoute
    group: ops.EpGroup
    maps: None = None


class FusedDispatcher:
    """Ranks of one machine write rows straight into each other's memory. Made collectively over `process_group`."""

    def __init__(self, process_group: dist.ProcessGroup | None = None, timeout_s: float = 300.0):
        world_size = dist.get_world_size(process_group)

        def all_gather(mine: bytes) -> list[bytes]:
            gathered: list[bytes] = [b""] * world_size
            dist.all_gather_object(gathered, mine, group=process_group)
            return gathered

        self.group = ops.EpGroup(dist.get_rank(process_group), world_size, all_gather, timeout_s)

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, num_experts: int) -> FusedRows:
        route = ops.ep_prepare(topk_idx_TK, num_experts, self.group)
        return FusedRows(ops.ep_dispatch(x_TD, route, self.group), route.offsets, route, self.group)

    def combine(self, y_RD: Tensor, dispatched: FusedRows, weights_TK: Tensor) -> Tensor:
        return ops.ep_combine(y_RD, dispatched.route, self.group, weights_TK)


class AllToAllRows(NamedTuple):
    """send and receive are rows per rank; the first map groups this rank's tokens by expert of any rank, the second
    the rows that came here by expert of this rank."""

    x: Tensor
    offsets: Tensor
    send: list[int]
    receive: list[int]
    token_map: tuple[Tensor, Tensor]
    row_map: tuple[Tensor, Tensor]
    maps: None = None
    group: None = None


class AllToAllDispatcher:
    """Permute, torch's all-to-all with uneven splits, permute. Works wherever the process group does."""

    def __init__(self, process_group: dist.ProcessGroup | None = None):
        self.group, self.world_size = process_group, dist.get_world_size(process_group)

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, num_experts: int) -> AllToAllRows:
        counts_E, _, row_of, src = ops.route_map(topk_idx_TK, num_experts)
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=self.group)
        send = counts_E.view(self.world_size, -1).sum(1).tolist()
        receive = arriving_E.view(self.world_size, -1).sum(1).tolist()
        token_map = (row_of, src[: sum(send)])
        rows = self._exchange(ops.permute(x_TD, *token_map), send, receive)
        experts_here = num_experts // self.world_size
        expert_R = torch.arange(experts_here, device=x_TD.device).repeat(self.world_size)
        expert_R = expert_R.repeat_interleave(arriving_E, output_size=sum(receive))
        _, offsets, *row_map = ops.route_map(expert_R[:, None], experts_here)
        return AllToAllRows(ops.permute(rows, *row_map), offsets, send, receive, token_map, tuple(row_map))

    def combine(self, y_RD: Tensor, dispatched: AllToAllRows, weights_TK: Tensor) -> Tensor:
        rows = ops.unpermute(y_RD, *dispatched.row_map)
        rows = self._exchange(rows, dispatched.receive, dispatched.send)
        return ops.unpermute(rows, *dispatched.token_map, weights_TK)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return _AllToAll.apply(rows, send, receive, self.group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group) -> Tensor:
        ctx.back = receive, send, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows, receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllToAll.apply(grad.contiguous(), *ctx.back), None, None, None
