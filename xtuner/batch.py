"""The one batch type: packed documents in one row of tokens.

Everything from the loader to the loss works on packed tensors `[T, …]`; there is no batch dimension and no padding.
Legend: T tokens, S documents, A rotary axes (1 for text), L layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Where a batch is cut into two halves of whole documents; known on the host.

    documents, tokens          of the first half; tokens of this slice
    max_seqlens, total_tokens  of both halves, as in Batch
    """

    documents: int
    tokens: int
    max_seqlens: tuple[int, int]
    total_tokens: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Documents packed end to end.

    input_ids    int64[T]
    labels       int64[T]    already shifted: labels[t] is the token that follows input_ids[t] in its document
    loss_weights float32[T]  0 where nothing is learned (prompts, the last token of a document)
    positions    int64[A, T] rotary positions, starting at 0 in each document
    cu_seqlens   int32[S+1]  document boundaries; cu_seqlens[S] == T
    max_seqlen   int         longest document, known on the host so that kernels need no synchronisation
    extras       per-token tensors [T, …] of an algorithm (old log-probabilities, advantages)
    routing      int32[T, L, K] expert choices to replay, or None
    total_tokens int         tokens of the whole of which this is a slice; None: this is the whole
    cut          Cut         into halves that go through each layer in turns; None: uncut

    Of a slice, cu_seqlens and max_seqlen still describe the whole; all other tensors are this slice's.
    """

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    extras: dict[str, Tensor] = field(default_factory=dict)
    routing: Tensor | None = None
    total_tokens: int | None = None
    cut: Cut | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        moved["extras"] = {k: v.to(device, non_blocking=True) for k, v in self.extras.items()}
        return replace(self, **moved)

    def halve(self) -> Batch:
        """The same batch, cut between two documents as near the middle as can be. A half may be empty."""
        ends = self.cu_seqlens.cpu()
        documents = int((ends.double() - self.num_tokens / 2).abs().argmin())
        lengths, tokens = ends.diff(), int(ends[documents])
        longest = tuple(int(half.max()) if len(half) else 0 for half in (lengths[:documents], lengths[documents:]))
        return replace(self, cut=Cut(documents, tokens, longest, (tokens, self.num_tokens - tokens)))

    def slice(self, index: int, parts: int) -> Batch:
        """Slice `index` of `parts` of the tokens, or of each half's, without regard to documents. See `slice_sizes`."""
        wholes = (self.num_tokens,) if self.cut is None else self.cut.total_tokens
        ranges, start = [], 0
        for total in wholes:
            sizes = slice_sizes(total, parts)
            ranges.append(range(start + sum(sizes[:index]), start + sum(sizes[: index + 1])))
            start += total
        here = torch.tensor([token for tokens in ranges for token in tokens], dtype=torch.int64)
        return replace(
            self,
            input_ids=self.input_ids[here],
            labels=self.labels[here],
            loss_weights=self.loss_weights[here],
            positions=self.positions[:, here],
            extras={k: v[here] for k, v in self.extras.items()},
            routing=None if self.routing is None else self.routing[here],
            total_tokens=self.num_tokens,
            cut=None if self.cut is None else replace(self.cut, tokens=len(ranges[0])),
        )


def slice_sizes(total: int, parts: int) -> list[int]:
    """Lengths of `parts` slices of `total` tokens: equal, or longer by one at the front."""
    return [total // parts + (i < total % parts) for i in range(parts)]
