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
    """One all-to-all before attention and one after it. Slices need not be equally long.

    Where there are fewer key/value heads than ranks, each rank receives the one head that its query heads read.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, total_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """[t, Hq, D] and [t, Hkv, D] of this slice to [T, Hq/P, D] and [T, max(Hkv/P, 1), D] of all tokens."""
        sizes, (tokens, _, width) = slice_sizes(total_tokens, self.size), q.shape
        if tokens != sizes[self.rank]:
            raise ValueError(f"slice {self.rank} of {total_tokens} tokens has {sizes[self.rank]}, got {tokens}")
        copies = max(1, self.size // k.shape[1])
        k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v))
        by_rank = [x.unflatten(1, (self.size, -1)) for x in (q, k, v)]
        heads = [x.shape[2] for x in by_rank]
        sent = torch.cat(by_rank, 2).transpose(0, 1).reshape(self.size * tokens, -1)
        got = _AllToAll.apply(sent, [tokens] * self.size, sizes, self.group)
        return got.view(total_tokens, sum(heads), width).split(heads, 1)

    def to_tokens(self, out: Tensor) -> Tensor:
        """[T, H/P, D] of all tokens to [t, H, D] of this slice."""
        sizes, (_, heads, width) = slice_sizes(out.shape[0], self.size), out.shape
        tokens = sizes[self.rank]
        got = _AllToAll.apply(out.flatten(1), sizes, [tokens] * self.size, self.group)
        return got.view(self.size, tokens, heads, width).transpose(0, 1).flatten(1, 2)


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
