"""Expert parallelism: the memory that ranks share, and where each token goes. The ops are in ep_*.py beside this."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from xtuner import _C

_groups: weakref.WeakValueDictionary[int, EpGroup] = weakref.WeakValueDictionary()
_ids = itertools.count()


class EpGroup:
    """Ranks that exchange rows through shared memory. All of them must call the same ops in the same order.

    Args:
        rank, world_size: this process in the group.
        all_gather: called with bytes on every rank, returns those of all ranks in rank order; any process group can
            serve. Used when the group is made and when its buffers must grow, not in between.
        timeout_s: how long an op waits for another rank before it raises OpError, naming the rank and what it owes.
            Longer than ranks may legitimately drift apart.

    The memory has no name in the file system and is freed with the last process that maps it, however that ends. An
    error that leaves an exchange half done breaks the group for good: its later ops fail at once.
    """

    def __init__(
        self, rank: int, world_size: int, all_gather: Callable[[bytes], list[bytes]], timeout_s: float = 300.0
    ):
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._all_gather = all_gather
        self._memory = _C.SharedMemory(rank, world_size, 0, timeout_s, all_gather)
        self.id = next(_ids)
        _groups[self.id] = self

    @property
    def memory(self) -> _C.SharedMemory:
        return self._memory

    def memory_for(self, route: tuple[Tensor, ...], row_bytes: int) -> _C.SharedMemory:
        """Shared memory with room for the rows of `route` on every rank.

        Every rank knows everybody's loads, so all grow at the same call and to the same size. Nothing in the old
        buffers is needed between ops. Memory is taken from the machine only when it is written to, so half again as
        much as needed is reserved, and growing is rare.
        """
        room = _C.ep_room(route[0], route[1], row_bytes)
        if room > self._memory.data_bytes:
            room += room // 2
            self._memory = _C.SharedMemory(self.rank, self.world_size, room, self.timeout_s, self._all_gather)
        return self._memory


def group_of(group_id: int) -> EpGroup:
    """The live group that an op was given the id of."""
    group = _groups.get(group_id)
    if group is None:
        raise _C.Error(f"ep: group {group_id} no longer exists; keep its EpGroup for as long as its ops run")
    return group


class EpRoute(NamedTuple):
    """The routing of one layer, seen from one of W ranks: T its tokens, R the rows of its experts, E all experts.

    offsets int64[E/W + 1]  first row of each expert of this rank; rows follow (source rank, token, k)
    counts  int32[W, E]     choices of each rank that go to each expert
    tokens  int32[W, W]     tokens that travel from rank to rank; one with several experts on a rank travels once
    dest    int32[T, K, 2]  rank and row of each choice, (-1, -1) where dropped
    slot    int32[T, W]     place of a token in each rank's receive buffer, -1 where it does not travel
    origin  int32[R]        place of each row in this rank's receive buffer; -1 - t for its own token t; else INT32_MIN
    """

    offsets: Tensor
    counts: Tensor
    tokens: Tensor
    dest: Tensor
    slot: Tensor
    origin: Tensor

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """What the ops take: all but the offsets."""
        return tuple(self)[1:]


def row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.element_size()


ROUTE_SCHEMA = "Tensor counts, Tensor tokens, Tensor dest, Tensor slot, Tensor origin"
