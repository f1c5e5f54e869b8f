"""The decoder-only transformer all current families share: embedding, blocks, norm, head, on packed [T, D]."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xtuner import ops
from xtuner.batch import Cut
from xtuner.config import ModelConfig
from xtuner.models.init import init_weights
from xtuner.nn.attention import Attention
from xtuner.nn.interleave import interleave
from xtuner.nn.kv_cache import KVCache
from xtuner.nn.linear import Linear
from xtuner.nn.mla import LatentAttention
from xtuner.nn.mlp import MLP
from xtuner.nn.moe import MoE
from xtuner.nn.norm import RMSNorm
from xtuner.nn.rope import rotary_tables
from xtuner.nn.router import RouterStats


class ModelOutput(NamedTuple):
    """A NamedTuple, so that FSDP2 finds the tensors in it.

    logits    [T, V] in compute dtype, or None when the loss was asked for
    loss_sum  float32 sum of loss_weights * cross-entropy, or None
    stats     one RouterStats per MoE layer
    """

    logits: Tensor | None
    loss_sum: Tensor | None
    stats: list[RouterStats]


class Part(NamedTuple):
    """A block's input, or one half of it: what Block.forward is given."""

    x_TD: Tensor
    rotary: tuple[Tensor, Tensor]
    cu_seqlens: Tensor
    max_seqlen: int
    total_tokens: int | None
    topk_idx: Tensor | None

    def halves(self, cut: Cut) -> list[Part]:
        tokens, cu = [cut.tokens, self.x_TD.shape[0] - cut.tokens], self.cu_seqlens
        x, cos, sin = (t.split(tokens) for t in (self.x_TD, *self.rotary))
        bounds = cu[: cut.documents + 1], cu[cut.documents :] - cu[cut.documents]
        topk_idx = (None, None) if self.topk_idx is None else self.topk_idx.split(tokens)
        return list(map(Part, x, zip(cos, sin, strict=True), bounds, cut.max_seqlens, cut.total_tokens, topk_idx))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attn = Attention(cfg, layer) if cfg.mla is None else LatentAttention(cfg, layer)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.is_moe = cfg.moe is not None and layer not in cfg.dense_layers
        if self.is_moe:
            self.moe = MoE(cfg.hidden_size, cfg.moe)
        else:
            self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(
        self,
        x_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None,
        total_tokens: int | None,
        cut: Cut | None,
        *,
        topk_idx: Tensor | None,
    ) -> tuple[Tensor, RouterStats | None]:
        whole = Part(x_TD, rotary, cu_seqlens, max_seqlen, total_tokens, topk_idx)
        if cut is None:
            return interleave([self._steps(whole, cache, pausing=False)])[0]
        first, second = interleave([self._steps(half, cache, pausing=True) for half in whole.halves(cut)])
        stats = first[1].joined(second[1]) if self.is_moe else None
        return torch.cat([first[0], second[0]]), stats

    def _steps(
        self, part: Part, cache: KVCache | None, pausing: bool
    ) -> Generator[None, None, tuple[Tensor, RouterStats | None]]:
        x_TD, rotary, cu_seqlens, max_seqlen, total_tokens, topk_idx = part
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rotary, cu_seqlens, max_seqlen, cache, total_tokens)
        if not self.is_moe:
            return x_TD + self.mlp(self.mlp_norm(x_TD)), None
        h_TD = self.mlp_norm(x_TD)
        y_TD, stats = (yield from self.moe.steps(h_TD, topk_idx)) if pausing else self.moe(h_TD, topk_idx)
        return x_TD + y_TD, stats


class Decoder(nn.Module):
    """See ModelConfig for the architecture and Batch for the packed layout of a call's arguments."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.num_hidden_layers)])
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def init_weights(self, seed: int) -> None:
        init_weights(self, seed, self.cfg.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        cache: KVCache | None = None,
        routing: Tensor | None = None,
        logit_rows: Tensor | None = None,
        total_tokens: int | None = None,
        cut: Cut | None = None,
    ) -> ModelOutput:
        """Logits, or with `labels` and `loss_weights` the weighted sum of cross-entropies instead.

        Args:
            cache: keys and values of earlier tokens; the new ones are appended.
            routing: int32 [T, L, K] expert choices to replay in the L MoE layers.
            logit_rows: int64 [S], the tokens whose logits [S, V] are wanted; None: all. Generation needs only the last.
            total_tokens: with sequence parallelism, the tokens that this rank holds a slice of.
            cut: where to cut into halves that go through each layer in turns, one computing while the other's tokens
                travel.
        """
        x_TD = self.embed(input_ids)
        rotary = rotary_tables(positions[0], self.cfg.head_dim, self.cfg.rope, x_TD.dtype)
        stats: list[RouterStats] = []
        for layer in self.layers:
            topk_idx = routing[:, len(stats)] if routing is not None and layer.is_moe else None
            x_TD, layer_stats = layer(
                x_TD, rotary, cu_seqlens, max_seqlen, cache, total_tokens, cut, topk_idx=topk_idx
            )
            if layer_stats is not None:
                stats.append(layer_stats)
        if cache is not None:
            cache.advance(cu_seqlens)
        if labels is None:
            wanted = x_TD if logit_rows is None else x_TD[logit_rows]
            return ModelOutput(ops.linear(self.norm(wanted), self._head_weight()), None, stats)
        # Only rows that are learned go through the head; in fine-tuning most are not.
        rows = loss_weights.nonzero()[:, 0]
        loss_sum = ops.linear_cross_entropy(
            self.norm(x_TD.index_select(0, rows)), self._head_weight(), labels[rows], loss_weights[rows]
        )
        return ModelOutput(None, loss_sum, stats)

    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight
