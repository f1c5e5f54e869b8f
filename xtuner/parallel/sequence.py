"""Ulysses sequence parallelism (Jacobs et al. 2023): ranks hold slices of the tokens, and in attention of the heads.

Legend: P ranks, T tokens of the whole sequence, t of this rank's slice, H heads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xtuner.batch import slice_sizes
from xtuner.parallel.layout import Layout


def split_sequences(model: nn.Module, layout: Layout) -> None:
    """Let every attention of `model` exchange slices of tokens for slices of heads, and back."""
    exchange = UlyssesExchange(layout.sp.get_group())
    for layer in model.layers:
        layer.attn.exchange = exchange


class UlyssesExchange:
    """Slices need not be equally long. Queries, keys and values travel one after the other, so that no more than one
    of them is held twice."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def to_heads(self, x_tHD: Tensor, total_tokens: int) -> Tensor:
        """[t, H, D] of this slice to [T, max(H/P, 1), D] of all tokens.

        Fewer heads than ranks are key/value heads: each rank receives the one that its query heads read.
        """
        sizes, (tokens, heads, width) = slice_sizes(total_tokens, self.size), x_tHD.shape
        if tokens != sizes[self.rank]:
            raise ValueError(f"slice {self.rank} of {total_tokens} tokens has {sizes[self.rank]}, got {tokens}")
        if heads < self.size:
            x_tHD = x_tHD.repeat_interleave(self.size // heads, 1)
        by_rank = x_tHD.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1).flatten(1)
        return self._exchange(by_rank, [tokens] * self.size, sizes).unflatten(1, (-1, width))

    def to_tokens(self, out_ThD: Tensor) -> Tensor:
        """[T, H/P, D] of all tokens to [t, H, D] of this slice."""
        sizes, (_, heads, width) = slice_sizes(out_ThD.shape[0], self.size), out_ThD.shape
        by_rank = self._exchange(out_ThD.flatten(1), sizes, [sizes[self.rank]] * self.size)
        return by_rank.view(self.size, sizes[self.rank], heads, width).transpose(0, 1).flatten(1, 2)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return _AllToAll.apply(rows, send, receive, self.group)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks and rows from them, as many as `send` and `receive` say; backward is the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = receive, send, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllToAll.apply(grad, *ctx.back), None, None, None
