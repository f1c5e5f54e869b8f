"""Tokens to experts that live on other ranks, and back: the token dispatchers of expert parallelism.

All give the bits of the local dispatcher: rows of an expert follow (rank, token, k), results are summed in k order.

Legend: W ranks, E experts of all of them, T tokens of this rank, K choices per token, R rows of this rank's experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xtuner import ops
from xtuner.parallel.dispatch_rounds import cut_into_rounds
from xtuner.parallel.peer_memory import make_group
from xtuner.parallel.travel import Travel
from xtuner.parallel.world import World

Experts = Callable[[Any], Tensor]  # dispatched tokens -> [R, D]


class Dispatcher:
    """What the dispatchers have in common: how many rows there may be, and what happens when more come.

    Args:
        process_group: the ranks that experts are spread over. All of them make the dispatcher and use it alike.
        mode: "exact": as many rows as come; the host reads the loads of the experts once in each layer.
            "static": always R = ceil(capacity_factor * T * K) rows, without a look at the loads, so that a step can be
            a CUDA graph; T must be the same on all ranks. Choices that find no room are dropped, which `check_overflow`
            turns into an error.
        capacity_factor: 1 is enough for perfect balance.
        max_load: rows that a rank's experts hold at a time, in units of the mean load of a rank. What exceeds it is
            done in rounds, each recomputed in backward, so that any routing trains in memory that depends on the number
            of tokens only. None: everything in one round.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        mode: Literal["exact", "static"] = "exact",
        capacity_factor: float = 2.0,
        max_load: float | None = None,
    ):
        self.process_group = process_group
        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.mode, self.capacity_factor, self.max_load = mode, capacity_factor, max_load
        self.bounded = max_load is not None and max_load < self.world_size
        self.overflow: Tensor | None = None

    def run(self, experts: Experts, x_TD: Tensor, topk_idx_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
        """combine(experts(dispatch(x))), in as many rounds as it takes to keep to `max_load`."""
        if not self.bounded:
            return self._round(experts, x_TD, topk_idx_TK, weights_TK, num_experts)
        if self.mode == "static":
            rounds = math.ceil(self.capacity_factor / self.max_load)
            sizes = [len(part) for part in topk_idx_TK.tensor_split(rounds)]
        else:
            plan = self._plan(topk_idx_TK, num_experts)
            max_rows = self._max_rows(plan)
            if int(plan.rows_WW.sum(0).max()) <= max_rows:
                tokens = self._send(x_TD, plan)
                return self.combine(experts(tokens), tokens, weights_TK)
            sizes = cut_into_rounds(topk_idx_TK, plan.rows_WW, max_rows, num_experts, self.process_group)
        parts = zip(x_TD.split(sizes), topk_idx_TK.split(sizes), weights_TK.split(sizes), strict=True)
        keep = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self._round, experts, *part, num_experts, **keep) for part in parts])

    def steps(self, *args: Any) -> Generator[None, None, Tensor]:
        """`run`, pausing while rows travel without this processor's doing."""
        yield from ()
        return self.run(*args)

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, num_experts: int):
        """In one round."""
        return self._send(x_TD, self._plan(topk_idx_TK, num_experts))

    def combine(self, y_RD: Tensor, dispatched: Any, weights_TK: Tensor) -> Tensor:
        raise NotImplementedError

    def _plan(self, topk_idx_TK: Tensor, num_experts: int):
        """What `_send` needs. When `bounded`, with `rows_WW`: on the host, rows from each rank for each rank."""
        raise NotImplementedError

    def _send(self, x_TD: Tensor, plan: Any):
        raise NotImplementedError

    def _round(self, experts: Experts, x_TD: Tensor, topk_idx_TK: Tensor, weights_TK: Tensor, num_experts: int):
        tokens = self.dispatch(x_TD, topk_idx_TK, num_experts)
        return self.combine(experts(tokens), tokens, weights_TK)

    def _max_rows(self, plan: Any) -> int:
        return math.ceil(self.max_load * int(plan.rows_WW.sum()) / self.world_size)

    def _capacity(self, topk_idx_TK: Tensor) -> int:
        return math.ceil(self.capacity_factor * topk_idx_TK.numel())

    def _note_missing(self, rows: Tensor) -> None:
        """`rows` (int64 scalar) more than there was room for; stays on the device."""
        if self.overflow is None:
            self.overflow = torch.zeros((), dtype=torch.int64, device=rows.device)
        self.overflow.copy_(torch.maximum(self.overflow, rows))


class FusedPlan(NamedTuple):
    route: ops.EpRoute
    rows_WW: Tensor | None


class FusedRows(NamedTuple):
    x: Tensor
    offsets: Tensor
    route: ops.EpRoute
    group: ops.EpGroup
    maps: None = None


class FusedDispatcher(Dispatcher):
    """Ranks write rows straight into each other's memory: processes of one machine, or GPUs that reach each other.

    `timeout_s` is how long a rank is waited for; `group` is made by `make_group` unless it is given. Other arguments as
    for `Dispatcher`.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
        **bounds: Any,
    ):
        super().__init__(process_group, **bounds)
        self.group = make_group(process_group, torch.device(device), timeout_s)

    def combine(self, y_RD: Tensor, dispatched: FusedRows, weights_TK: Tensor) -> Tensor:
        return ops.ep_combine(y_RD, dispatched.route, self.group, weights_TK)

    def _plan(self, topk_idx_TK: Tensor, num_experts: int) -> FusedPlan:
        if self.mode == "static":
            route = ops.ep_prepare(topk_idx_TK, num_experts, self.group, self._capacity(topk_idx_TK))
            rows = route.counts.view(self.world_size, self.world_size, -1)[:, self.rank].sum()
            self._note_missing(rows - route.capacity)
            return FusedPlan(route, None)
        route = ops.ep_prepare(topk_idx_TK, num_experts, self.group)
        if not self.bounded and not self.group.must_reserve:
            return FusedPlan(route, None)  # the dispatch reads how many rows it needs
        rows_WW = rows_between_ranks(route.counts)
        return FusedPlan(route._replace(capacity=int(rows_WW[:, self.rank].sum())), rows_WW)

    def _send(self, x_TD: Tensor, plan: FusedPlan) -> FusedRows:
        if self.group.must_reserve:
            rows = plan.route.capacity if plan.rows_WW is None else int(plan.rows_WW.sum(0).max())
            self.group.reserve(rows_of_an_op(rows, x_TD))
        return FusedRows(ops.ep_dispatch(x_TD, plan.route, self.group), plan.route.offsets, plan.route, self.group)


class AllToAllPlan(NamedTuple):
    """Rows to send to and to receive from each rank; the first map groups this rank's tokens by expert of any rank, the
    second the rows that come here by expert of this rank."""

    send: list[int]
    receive: list[int]
    token_map: tuple[Tensor, Tensor]
    row_map: tuple[Tensor, Tensor]
    offsets: Tensor
    rows_WW: Tensor | None


class AllToAllRows(NamedTuple):
    x: Tensor
    offsets: Tensor
    plan: AllToAllPlan
    maps: None = None
    group: None = None


class AllToAllDispatcher(Dispatcher):
    """Permute, torch's all-to-all, permute. Works wherever the process group does.

    In static mode each rank has room for R/W rows from each other. Arguments as for `Dispatcher`.
    """

    def combine(self, y_RD: Tensor, dispatched: AllToAllRows, weights_TK: Tensor) -> Tensor:
        plan = dispatched.plan
        rows = exchange_rows(ops.unpermute(y_RD, *plan.row_map), plan.receive, plan.send, self.process_group)
        return ops.unpermute(rows, *plan.token_map, weights_TK)

    def steps(
        self, experts: Experts, x_TD: Tensor, topk_idx_TK: Tensor, weights_TK: Tensor, num_experts: int
    ) -> Generator[None, None, Tensor]:
        plan = self._plan(topk_idx_TK, num_experts)
        if self.bounded and (plan.rows_WW is None or int(plan.rows_WW.sum(0).max()) > self._max_rows(plan)):
            return self.run(experts, x_TD, topk_idx_TK, weights_TK, num_experts)
        way = Travel(plan.send, plan.receive, self.process_group)
        rows = way.start(ops.permute(x_TD, *plan.token_map))
        yield
        tokens = AllToAllRows(ops.permute(way.finish(rows), *plan.row_map), plan.offsets, plan)
        way = Travel(plan.receive, plan.send, self.process_group)
        rows = way.start(ops.unpermute(experts(tokens), *plan.row_map))
        yield
        return ops.unpermute(way.finish(rows), *plan.token_map, weights_TK)

    def _send(self, x_TD: Tensor, plan: AllToAllPlan) -> AllToAllRows:
        rows = exchange_rows(ops.permute(x_TD, *plan.token_map), plan.send, plan.receive, self.process_group)
        return AllToAllRows(ops.permute(rows, *plan.row_map), plan.offsets, plan)

    def _plan(self, topk_idx_TK: Tensor, num_experts: int) -> AllToAllPlan:
        counts_E, first_E1, row_of, src = ops.route_map(topk_idx_TK, num_experts)
        counts_WE = counts_E.new_empty(self.world_size, num_experts)
        dist.all_gather(list(counts_WE), counts_E, group=self.process_group)
        arriving = counts_WE.view(self.world_size, self.world_size, -1)[:, self.rank]  # [W, E/W]
        if self.mode == "static":
            chunk = math.ceil(self._capacity(topk_idx_TK) / self.world_size)
            first_W = first_E1[: -1 : num_experts // self.world_size]
            token_map = _into_chunks(topk_idx_TK, row_of, first_W, num_experts, chunk)
            self._note_missing(arriving.sum(1).max() - chunk)
            send = receive = [chunk] * self.world_size
            rows_WW, place = None, torch.arange(chunk, device=src.device).expand(self.world_size, -1).contiguous()
            expert_R = torch.searchsorted(arriving.cumsum(1), place, right=True)
            expert_R = torch.where(expert_R < arriving.shape[1], expert_R, -1).flatten()
        else:
            rows_WW = rows_between_ranks(counts_WE)
            send, receive = rows_WW[self.rank].tolist(), rows_WW[:, self.rank].tolist()
            token_map = (row_of, src[: sum(send)])
            experts = torch.arange(arriving.shape[1], device=src.device).repeat(self.world_size)
            expert_R = experts.repeat_interleave(arriving.flatten(), output_size=sum(receive))
        _, offsets, *row_map = ops.route_map(expert_R[:, None], arriving.shape[1])
        return AllToAllPlan(send, receive, token_map, tuple(row_map), offsets, rows_WW)


def rows_of_an_op(rows: int, x_TD: Tensor) -> int:
    """Bytes that the ops of a dispatch and its gradients need at most: rows, and their gradients beside them."""
    return 2 * (rows * x_TD.shape[1] * x_TD.element_size() + 512)


def rows_between_ranks(counts_WE: Tensor) -> Tensor:
    """[W, W] on the host: the choices that each rank has for the experts of each rank."""
    world = counts_WE.shape[0]
    return counts_WE.view(world, world, -1).sum(-1).cpu()


def _into_chunks(topk_idx_TK: Tensor, row_of: Tensor, first_W: Tensor, num_experts: int, chunk: int):
    """Maps to a buffer with `chunk` rows for each rank, whose rows begin at first_W in row_of, and drop the rest."""
    world = first_W.numel()
    rank_TK = (topk_idx_TK.clamp_min(0) * world // num_experts).long()
    place = row_of - first_W[rank_TK]
    fits = (row_of >= 0) & (place < chunk)
    row_of = torch.where(fits, rank_TK * chunk + place, -1).int()
    src = row_of.new_full((world * chunk + 1,), -1)  # the last takes what is dropped
    flat = torch.arange(row_of.numel(), dtype=torch.int32, device=row_of.device)
    src[torch.where(fits, row_of, world * chunk).flatten().long()] = flat
    return row_of, src[:-1].contiguous()


def exchange_rows(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The next send[p] of `rows` go to rank p; receive[p] rows come from it. Differentiable."""
    return _AllToAll.apply(rows, send, receive, group)


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


def check_overflow(model: nn.Module, world: World) -> None:
    """After backward, before the optimizer: whether all rows of this step found room. Collective in static mode.

    Raises:
        OpError: on every rank, when choices were dropped on any.
    """
    dispatchers = {layer.moe.dispatcher for layer in model.layers if layer.is_moe}
    notes = [d.overflow for d in dispatchers if isinstance(d, Dispatcher) and d.overflow is not None]
    if not notes:
        return
    missing = torch.stack(notes).sum().clamp_min(0)
    for note in notes:
        note.zero_()
    missing = int(world.all_reduce_sum(missing))
    if missing:
        raise ops.OpError(
            f"static dispatch: {missing} rows of experts found no room in this step; raise parallel.capacity_factor or "
            "set parallel.dispatch_mode=exact"
        )
