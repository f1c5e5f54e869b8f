"""Expert parallelism: the memory that ranks share, and where each token goes. The ops are in ep_*.py beside this."""

from __future__ import annotations

import itertools
import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from xtuner import _C

_groups: weakref.WeakValueDictionary[int, EpGroup] = weakref.WeakValueDictionary()
_ids = itertools.count()

AllGather = Callable[[bytes], list[bytes]]


class Area(Protocol):
    """Memory that the other ranks reach, for the tensors of one op."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised."""

    def share(self, x: Tensor) -> Tensor:
        """x, or a copy of it, in this memory."""

    def keep(self, x: Tensor) -> Tensor:
        """x of this memory, or a copy of it, for as long as anybody needs it."""


class EpGroup:
    """Ranks that exchange rows through memory that all of them reach. All must call the same ops in the same order.

    An exchange left half done breaks the group for good.
    """

    peers: _C.Peers
    must_reserve = False  # whether ops need `reserve` first

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self.id = next(_ids)
        _groups[self.id] = self

    def reserve(self, num_bytes: int) -> None:
        """From now on an op's rows may take this much on a rank. Collective, with the same number on all ranks."""

    def next_area(self) -> Area:
        """For the tensors of the op that comes."""
        raise NotImplementedError

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised, where `ep_combine` reads it with the least copying."""
        raise NotImplementedError


class HostEpGroup(EpGroup):
    """Processes (or threads) of one machine that share its memory, computing on the CPU.

    Args:
        rank, world_size: this process in the group.
        all_gather: called with bytes on every rank, returns those of all ranks in rank order; any process group can
            serve. Used only when the group is made.
        timeout_s: how long an op waits for another rank before it raises OpError, naming the rank and what it owes.
            Longer than ranks may legitimately drift apart.

    The memory has no name in the file system and is freed with the last process that maps it, however that ends. It is
    taken from the machine when first used and kept for reuse. After an error that leaves an exchange half done, later
    ops fail at once.
    """

    def __init__(self, rank: int, world_size: int, all_gather: AllGather, timeout_s: float = 300.0):
        super().__init__(rank, world_size)
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # more could not be used anyway
        self.memory = _C.SharedMemory(rank, world_size, machine, timeout_s, all_gather)
        self.peers = self.memory.peers

    def next_area(self) -> HostEpGroup:
        return self

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not math.prod(shape):
            return torch.empty(tuple(shape), dtype=dtype)
        piece = _C.SharedPiece(self.memory, math.prod(shape) * dtype.itemsize)
        return torch.frombuffer(piece, dtype=dtype).view(tuple(shape))

    def share(self, x: Tensor) -> Tensor:
        return x if self.memory.owns(x) else self.empty(x.shape, x.dtype).copy_(x)

    def keep(self, x: Tensor) -> Tensor:
        return x


def group_of(group_id: int) -> EpGroup:
    """The live group that an op was given the id of."""
    group = _groups.get(group_id)
    if group is None:
        raise _C.Error(f"ep: group {group_id} no longer exists; keep its EpGroup for as long as its ops run")
    return group


class EpRoute(NamedTuple):
    """The routing of one layer, seen from one of W ranks with T tokens; E experts over all ranks.

    offsets  int64[E/W + 1]  first row of each expert of this rank; rows follow (source rank, token, k)
    counts   int32[W, E]     choices of each rank that go to each expert
    dest     int32[T, K, 2]  rank and row of each choice, (-1, -1) where dropped
    capacity                 rows R of this rank; None: as many as come, which the host reads
    """

    offsets: Tensor
    counts: Tensor
    dest: Tensor
    capacity: int | None = None


ROUTE_SCHEMA = "Tensor counts, Tensor dest"
