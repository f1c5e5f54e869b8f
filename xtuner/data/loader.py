"""From packs to batches: which packs a rank sees, in which order, resumable at any optimizer step.

The stream of packs is a pure function of (seed, position). Ranks take turns within a step, so 1 rank with
micro-batches of 4 packs sees what 4 ranks with micro-batches of 1 see.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from xtuner.batch import Batch
from xtuner.data.dataset import Pack, PackedDataset
from xtuner.errors import ConfigError, DataError


def collate(packs: Sequence[Pack]) -> Batch:
    """All documents of `packs` end to end, without padding.

    Labels are shifted within a document. The last token of a document has nothing to predict: label 0, weight 0.
    """
    documents = [ids for pack in packs for ids in pack.ids]
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    ends = np.cumsum(lengths)
    ids = np.concatenate(documents).astype(np.int64)
    learned = np.concatenate([mask for pack in packs for mask in pack.masks])
    labels = np.append(ids[1:], 0)
    weights = np.append(learned[1:], 0).astype(np.float32)
    labels[ends - 1] = 0
    weights[ends - 1] = 0
    positions = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(weights),
        positions=torch.from_numpy(positions[None]),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
    )


class Loader:
    """Endless optimizer steps of `global_batch_size` packs, of which this rank gets its share.

    global_batch_size: packs per optimizer step over all ranks; micro_batch_size: packs per forward pass of one rank.
    Raises ConfigError when a step does not divide into micro-batches, DataError when the dataset is empty.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size={global_batch_size} must be a positive multiple of "
                f"micro_batch_size={micro_batch_size} x world_size={world_size}"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is not in 0..{world_size - 1}")
        if not len(dataset):
            raise DataError("the dataset holds no packs")
        self._dataset = dataset
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle = seed, shuffle
        self._packs_consumed = 0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its permutation)

    @property
    def epoch(self) -> float:
        """Passes over the dataset so far, by all ranks together."""
        return self._packs_consumed / len(self._dataset)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step. An epoch may end, and the next begin, inside a step."""
        stride = self._world_size * self._micro_batch_size
        firsts = range(self._rank * self._micro_batch_size, self._global_batch_size, stride)
        positions = [[self._packs_consumed + first + i for i in range(self._micro_batch_size)] for first in firsts]
        batches = [collate([self._dataset[self._pack_at(p)] for p in micro]) for micro in positions]
        self._packs_consumed += self._global_batch_size
        return batches

    def state_dict(self) -> dict[str, int]:
        return {"packs_consumed": self._packs_consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where another loader (of any world size and batch size) stopped."""
        self._packs_consumed = int(state["packs_consumed"])

    def _pack_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self._dataset))
        if not self._shuffle:
            return index
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._dataset)))
        return int(self._order[1][index])
