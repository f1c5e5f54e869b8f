"""One process that takes itself for rank 0 of many, with tensors without data: what it must be told for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner import ops
from xtuner.engine import train_step as engine_step
from xtuner.optim import clip_grad_norm, matrices, muon
from xtuner.parallel import AllToAllDispatcher, World
from xtuner.parallel.dispatch import AllToAllPlan
from xtuner.plan.internals import (
    MESH_METHODS,
    FakeStore,
    _compute_local_shape_and_global_offset,
    _fsdp_param,
    check_internals,
)


@contextmanager
def fake_world(num_ranks: int, per_node: int) -> Iterator[World]:
    """A process group of which no other rank is there. Layouts, which are about real numbers, are built in it."""
    check_internals()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield World(0, 0, num_ranks, min(num_ranks, per_node), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_tensors(imbalance: float = 1.0, fake: bool = True) -> Iterator[None]:
    """Within it, and `fake_world`, the engine builds and steps as it would with the other ranks.

    Args:
        imbalance: rows that come to this rank's experts over the mean.
        fake: tensors without data; else what arrives from other ranks is whatever memory held.
    """
    with ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_PlannedAnswers())
        else:  # no values travel over a fake process group, so that there is no norm to speak of
            stack.enter_context(mock.patch.object(engine_step, "clip_grad_norm", _clip_but_say_one))
        stack.enter_context(mock.patch.object(muon, "product_dtype", lambda device: torch.bfloat16))  # a GPU's
        for name in MESH_METHODS:
            stack.enter_context(mock.patch.object(DeviceMesh, name, _without_fake(getattr(DeviceMesh, name))))
        stack.enter_context(mock.patch.object(_fsdp_param, "_chunk_with_empty", _Chunks))
        stack.enter_context(mock.patch.object(AllToAllDispatcher, "_plan", _planned_loads(imbalance)))
        stack.enter_context(mock.patch.object(matrices, "local_rows", _without_fake(matrices.local_rows)))
        stack.enter_context(mock.patch.object(matrices, "rows_of_all_ranks", _planned_rows))
        yield


def _clip_but_say_one(*args: Any) -> float:
    clip_grad_norm(*args)
    return 1.0


def _without_fake(method: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return method(*args, **kwargs)

    return call


class _Chunks:
    """torch.chunk that makes only what is asked for: FSDP2 cuts each parameter for all ranks and keeps one piece."""

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int):
        self.tensor, self.dim = tensor, dim
        self.size = -(-tensor.shape[dim] // num_chunks)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.size
        if start >= self.tensor.shape[self.dim]:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, start, min(self.size, self.tensor.shape[self.dim] - start))


class _PlannedAnswers(TorchDispatchMode):
    """What a host would read from tensors that have no data: every token is learned, every figure is one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not args or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def _planned_loads(imbalance: float) -> Callable:
    """In place of AllToAllDispatcher._plan, which reads loads: this rank sends evenly and gets `imbalance` the mean."""

    def plan(self: AllToAllDispatcher, topk_idx_TK: Tensor, num_experts: int) -> AllToAllPlan:
        counts_E, _, row_of, src = ops.route_map(topk_idx_TK, num_experts)
        counts_WE = counts_E.new_empty(self.world_size, num_experts)
        dist.all_gather(list(counts_WE), counts_E, group=self.process_group)
        rows = topk_idx_TK.numel()
        send = _spread(rows, self.world_size)
        receive = _spread(math.ceil(imbalance * rows), self.world_size)
        here = num_experts // self.world_size
        expert_R = torch.zeros(sum(receive), dtype=torch.int64, device=src.device)
        _, offsets, *row_map = ops.route_map(expert_R[:, None], here)
        return AllToAllPlan(send, receive, (row_of, src), tuple(row_map), offsets, None)

    return plan


def _spread(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _planned_rows(params: Sequence[Tensor]) -> list[list[tuple[int, int]]]:
    """In place of `matrices.rows_of_all_ranks`, which asks them all."""
    size = dist.get_world_size()
    return [list(shards) for shards in zip(*(_shards(p, size) for p in params), strict=True)]


def _shards(param: Tensor, num_ranks: int) -> tuple[tuple[int, int], ...]:
    if not isinstance(param, DTensor):
        return ((0, param.shape[0]),) * num_ranks
    return _cut(tuple(param.shape), param.device_mesh, param.placements)


@lru_cache(maxsize=64)
def _cut(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple) -> tuple[tuple[int, int], ...]:
    """First row and end of every rank's shard, in the order of ranks."""
    with unset_fake_temporarily():
        rows = {}
        for coordinate in torch.cartesian_prod(*map(torch.arange, mesh.shape)).view(-1, mesh.ndim).tolist():
            local, offset = _compute_local_shape_and_global_offset(
                torch.Size(shape), mesh.shape, coordinate, placements
            )
            rows[int(mesh.mesh[tuple(coordinate)])] = offset[0], offset[0] + local[0]
        return tuple(rows[rank] for rank in sorted(rows))
