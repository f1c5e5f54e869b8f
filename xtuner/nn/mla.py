"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over packed documents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtuner import ops
from xtuner.config import ModelConfig
from xtuner.nn.attention import SequenceExchange
from xtuner.nn.kv_cache import KVCache
from xtuner.nn.linear import Linear
from xtuner.nn.norm import RMSNorm
from xtuner.nn.rope import softmax_factor

_LATENT_EPS = 1e-6  # of the norms on latents, which released configs do not name


class LatentAttention(nn.Module):
    """Keys and values of all heads are made of one latent per token, queries of another where q_lora_rank is given.

    Each head has features without position and `qk_rope_head_dim` rotated ones, whose key all heads share. Checkpoints
    keep rotated features in neighbouring pairs; sorted into halves, which leaves products of queries and keys the
    same, they suit `ops.rotary`.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        mla, heads = cfg.mla, cfg.num_attention_heads
        self.layer, self.heads = layer, heads
        self.plain, self.rotated, self.width_v = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self.latent = mla.kv_lora_rank
        self.scale = (self.plain + self.rotated) ** -0.5 * softmax_factor(cfg.rope)
        width_q = heads * (self.plain + self.rotated)
        if mla.q_lora_rank is None:
            self.wq = Linear(cfg.hidden_size, width_q, bias=False)
        else:
            self.wq_a = Linear(cfg.hidden_size, mla.q_lora_rank, bias=cfg.attention_bias)
            self.q_norm = RMSNorm(mla.q_lora_rank, _LATENT_EPS)
            self.wq_b = Linear(mla.q_lora_rank, width_q, bias=False)
        self.wkv_a = Linear(cfg.hidden_size, self.latent + self.rotated, bias=cfg.attention_bias)
        self.kv_norm = RMSNorm(self.latent, _LATENT_EPS)
        self.wkv_b = Linear(self.latent, heads * (self.plain + self.width_v), bias=False)
        self.wo = Linear(heads * self.width_v, cfg.hidden_size, bias=cfg.attention_bias)
        self.exchange: SequenceExchange | None = None  # None: all tokens are here

    def forward(
        self,
        x_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None = None,
        total_tokens: int | None = None,
    ) -> Tensor:
        """As `Attention.forward`; a `cache` keeps latents, of which keys and values are made again at every call."""
        q = self._queries(x_TD).unflatten(-1, (self.heads, -1))
        q_plain, q_rotated = q.split([self.plain, self.rotated], -1)
        latent, k_rotated = self.wkv_a(x_TD).split([self.latent, self.rotated], -1)
        latent = self.kv_norm(latent)
        q_rotated = ops.rotary(_halves(q_rotated), *rotary)
        k_rotated = ops.rotary(_halves(k_rotated[:, None]), *rotary)
        cu_k, max_k = cu_seqlens, max_seqlen
        if cache is not None:
            latent, k_rotated, cu_k, max_k = cache.append(self.layer, (latent, k_rotated), cu_seqlens)
        k_plain, v = self.wkv_b(latent).unflatten(-1, (self.heads, -1)).split([self.plain, self.width_v], -1)
        q = torch.cat([q_plain, q_rotated], -1)
        k = torch.cat([k_plain, k_rotated.expand(-1, self.heads, -1)], -1)
        if self.exchange is not None:
            q = self.exchange.to_heads(q, total_tokens)
            k = self.exchange.to_heads(k, total_tokens)
            v = self.exchange.to_heads(v, total_tokens)
        out = ops.attention(q, k, v, cu_seqlens, cu_k, max_seqlen, max_k, self.scale)
        if self.exchange is not None:
            out = self.exchange.to_tokens(out)
        return self.wo(out.flatten(1))

    def _queries(self, x_TD: Tensor) -> Tensor:
        return self.wq(x_TD) if hasattr(self, "wq") else self.wq_b(self.q_norm(self.wq_a(x_TD)))


def _halves(x: Tensor) -> Tensor:
    """Features 0 1 2 3 … of the last dim as 0 2 … 1 3 …"""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
