"""The one batch type: packed documents in one row of tokens.

Everything from the loader to the loss works on packed tensors `[T, …]`; there is no batch dimension and no padding.
Legend: T tokens, S documents, A rotary axes (1 for text), L layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


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

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        moved["extras"] = {k: v.to(device, non_blocking=True) for k, v in self.extras.items()}
        return replace(self, **moved)

    def slice(self, index: int, parts: int) -> Batch:
        """Slice `index` of `parts` slices of the tokens, cut without regard to documents. See `slice_sizes`."""
        sizes = slice_sizes(self.num_tokens, parts)
        part = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        return replace(
            self,
            input_ids=self.input_ids[part],
            labels=self.labels[part],
            loss_weights=self.loss_weights[part],
            positions=self.positions[:, part],
            extras={k: v[part] for k, v in self.extras.items()},
            routing=None if self.routing is None else self.routing[part],
            total_tokens=self.num_tokens,
        )


def slice_sizes(total: int, parts: int) -> list[int]:
    """Lengths of `parts` slices of `total` tokens: equal, or longer by one at the front."""
    return [total // parts + (i < total % parts) for i in range(parts)]
