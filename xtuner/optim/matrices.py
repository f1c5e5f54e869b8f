"""Whole matrices out of row shards, and back: for optimizers that need a matrix as a whole.

A parameter stacks matrices of the same shape along dim 0; a rank holds some of its rows, which may cut a matrix
anywhere. Every matrix has one owner, a rank that holds all of it where there is one, else the rank with the least work
so far. One all-to-all takes rows to the owners, another takes results to everybody who holds these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner.parallel import local_rows


class Rows(NamedTuple):
    """Rows [start, stop) of a parameter, on a rank."""

    rank: int
    start: int
    stop: int


class Matrix(NamedTuple):
    """One matrix of parameter number `param`, rows [start, stop) of it; `sources` cover it once, in order."""

    param: int
    start: int
    stop: int
    owner: int
    sources: list[Rows]
    holders: list[Rows]


class MatrixExchange:
    """Over all ranks and the given parameters, which may be sharded differently. Made collectively, in any layout.

    Args:
        params: plain tensors or DTensors sharded along dim 0.
        num_matrices: how many matrices each of them stacks.
        load: work of each rank so far, to be balanced; it is added to.
    """

    def __init__(self, params: Sequence[Tensor], num_matrices: Sequence[int], load: list[float]):
        self.rank, self.size = _rank(), _world_size()
        self.first_rows, self.widths = [local_rows(p)[1] for p in params], [p.shape[1] for p in params]
        shards = rows_of_all_ranks(params)
        self.matrices: list[Matrix] = []
        for index, (param, count) in enumerate(zip(params, num_matrices, strict=True)):
            held = [Rows(rank, *shards[rank][index]) for rank in range(self.size)]
            height = param.shape[0] // count
            for start in range(0, param.shape[0], height):
                self.matrices.append(_plan_matrix(index, start, start + height, held, load))
                work = height * param.shape[1] * min(height, param.shape[1])
                load[self.matrices[-1].owner] += work

    def map(self, shards: Sequence[Tensor], function: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """Apply `function` to whole matrices; local rows of the results, like `shards`. Collective.

        Args:
            shards: this rank's rows of a tensor shaped like each parameter.
            function: from the list of matrices that this rank owns to a list of the same shapes.
        """
        mine = [m for m in self.matrices if m.owner == self.rank]
        # What I send to each rank is in the order of the plan, and so is what each rank sends to me.
        outgoing = [[] for _ in range(self.size)]
        incoming = [[] for _ in range(self.size)]
        for matrix in self.matrices:
            for rows in matrix.sources:
                if rows.rank == self.rank:
                    outgoing[matrix.owner].append(self._local(shards, matrix.param, rows))
                if matrix.owner == self.rank:
                    incoming[rows.rank].append((rows.stop - rows.start, self.widths[matrix.param]))
        pieces = [iter(received) for received in _all_to_all(outgoing, incoming, shards[0])]
        results = function([torch.cat([next(pieces[rows.rank]) for rows in m.sources]) for m in mine])
        outgoing = [[] for _ in range(self.size)]
        incoming = [[] for _ in range(self.size)]
        for matrix, result in zip(mine, results, strict=True):
            for rows in matrix.holders:
                outgoing[rows.rank].append(result[rows.start - matrix.start : rows.stop - matrix.start])
        held = [(m, rows) for m in self.matrices for rows in m.holders if rows.rank == self.rank]
        for matrix, rows in held:
            incoming[matrix.owner].append((rows.stop - rows.start, self.widths[matrix.param]))
        pieces = [iter(received) for received in _all_to_all(outgoing, incoming, shards[0])]
        outputs = [torch.empty_like(shard) for shard in shards]
        for matrix, rows in held:
            self._local(outputs, matrix.param, rows).copy_(next(pieces[matrix.owner]))
        return outputs

    def _local(self, shards: Sequence[Tensor], param: int, rows: Rows) -> Tensor:
        first = self.first_rows[param]
        return shards[param][rows.start - first : rows.stop - first]


def _plan_matrix(param: int, start: int, stop: int, held: list[Rows], load: list[float]) -> Matrix:
    holders = [Rows(r.rank, max(r.start, start), min(r.stop, stop)) for r in held if r.start < stop and r.stop > start]
    whole = [r.rank for r in holders if (r.start, r.stop) == (start, stop)]
    owner = min(whole or range(len(held)), key=lambda rank: load[rank])
    sources, row = [], start
    while row < stop:  # where ranks hold copies, the owner's own comes first, then the lowest rank's
        best = min((r for r in holders if r.start <= row < r.stop), key=lambda r: (r.rank != owner, r.rank))
        sources.append(Rows(best.rank, row, best.stop))
        row = best.stop
    return Matrix(param, start, stop, owner, sources, holders)


def _all_to_all(
    outgoing: list[list[Tensor]], incoming: list[list[tuple[int, int]]], like: Tensor
) -> list[list[Tensor]]:
    """Exchange lists of matrices; `incoming` gives the shapes of what each rank sends here."""
    if len(outgoing) == 1:
        return outgoing
    # Most ranks have nothing for each other, so nothing is done rank by rank.
    flat = [t.reshape(-1) for tensors in outgoing for t in tensors]
    received = like.new_empty(sum(rows * width for shapes in incoming for rows, width in shapes))
    dist.all_to_all_single(
        received,
        torch.cat(flat) if flat else like.new_empty(0),
        [sum(rows * width for rows, width in shapes) for shapes in incoming],
        [sum(t.numel() for t in tensors) for tensors in outgoing],
    )
    parts = iter(received.split([rows * width for shapes in incoming for rows, width in shapes]))
    return [[next(parts).view(shape) for shape in shapes] for shapes in incoming]


def rows_of_all_ranks(params: Sequence[Tensor]) -> list[list[tuple[int, int]]]:
    """For each rank the first row of its shard of each of `params`, and the row after its last. Collective."""
    shards = [local_rows(p) for p in params]
    mine = [(first, first + len(local)) for local, first in shards]
    gathered = [mine] * _world_size()
    if _world_size() > 1:
        dist.all_gather_object(gathered, mine)
    return gathered


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
