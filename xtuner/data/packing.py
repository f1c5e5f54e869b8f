"""Which documents share a pack. Pure functions of lengths: nothing here knows about ranks or shuffling.

A plan lists pieces (document, first token, number of tokens) pack after pack, as arrays: a Python object per document
would not scale. D documents, P packs, Q pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackPlan:
    """Pack p holds the pieces starts[p] <= q < starts[p + 1].

    starts int64[P+1]; document int64[Q]; begin int64[Q] first token within the document; length int64[Q]
    """

    starts: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    length: np.ndarray

    @property
    def num_packs(self) -> int:
        return len(self.starts) - 1

    def fill(self) -> np.ndarray:
        """int64[P]: tokens in each pack."""
        return np.add.reduceat(self.length, self.starts[:-1]) if self.num_packs else np.empty(0, dtype=np.int64)


def best_fit(lengths: np.ndarray, documents: np.ndarray, capacity: int) -> PackPlan:
    """Whole documents, longest first, each into the fullest pack that still has room (best-fit decreasing).

    lengths int64[D], all in 1..capacity; documents int64[D]: the numbers they go by. Packs are ordered by their
    earliest document. Deterministic; O(D log D) plus, per document, a scan of a `capacity`-bit number.
    """
    order = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by free tokens
    rooms = 0  # bit r is set when some pack has exactly r tokens free
    num_packs = 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, num_packs
            num_packs += 1
        pack_of[index] = pack
        left = room - length
        if left:
            with_room[left].append(pack)
            rooms |= 1 << left
    return _grouped(pack_of, num_packs, lengths, documents)


def _grouped(pack_of: np.ndarray, num_packs: int, lengths: np.ndarray, documents: np.ndarray) -> PackPlan:
    earliest = np.full(num_packs, len(pack_of), dtype=np.int64)
    np.minimum.at(earliest, pack_of, np.arange(len(pack_of)))
    rank = np.empty(num_packs, dtype=np.int64)
    rank[np.argsort(earliest)] = np.arange(num_packs)
    pack_of = rank[pack_of]
    by_pack = np.argsort(pack_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))]).astype(np.int64)
    return PackPlan(starts, documents[by_pack], np.zeros(len(by_pack), dtype=np.int64), lengths[by_pack])


def exact(lengths: np.ndarray, documents: np.ndarray, capacity: int) -> PackPlan:
    """All documents end to end, cut every `capacity` tokens; only the last pack may be shorter. Arguments as above."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # A piece ends where a document or a pack ends.
    edges = np.union1d(ends, np.arange(capacity, total, capacity)) if total else np.empty(0, dtype=np.int64)
    begins = np.concatenate([[0], edges[:-1]]).astype(np.int64)[: len(edges)]
    owner = np.searchsorted(ends, begins, side="right")
    first_of_pack = np.flatnonzero(begins % capacity == 0)
    return PackPlan(
        starts=np.append(first_of_pack, len(begins)).astype(np.int64),
        document=documents[owner],
        begin=begins - (ends - lengths)[owner],
        length=edges - begins,
    )
