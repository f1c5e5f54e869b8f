"""Grouped-query attention over packed documents."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from xtuner import ops
from xtuner.config import ModelConfig
from xtuner.nn.kv_cache import KVCache
from xtuner.nn.linear import Linear, linear_qkv
from xtuner.nn.norm import RMSNorm


class SequenceExchange(Protocol):
    """Between a slice of the tokens with all heads and all tokens with some of the heads. Sequence parallelism is an
    implementation of this. T tokens, t of this rank's slice; H heads, h of this rank."""

    def to_heads(self, x_tHD: Tensor, total_tokens: int) -> Tensor:
        """[t, H, D] to [T, h, D]."""
        ...

    def to_tokens(self, out_ThD: Tensor) -> Tensor:
        """[T, h, D] to [t, H, D]."""
        ...


class Attention(nn.Module):
    """GQA with rotary positions and, in the Qwen3 families, an RMSNorm on each query and key head."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, cfg.head_dim
        width_q, width_kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.wq = Linear(cfg.hidden_size, width_q, bias=cfg.attention_bias)
        self.wk = Linear(cfg.hidden_size, width_kv, bias=cfg.attention_bias)
        self.wv = Linear(cfg.hidden_size, width_kv, bias=cfg.attention_bias)
        self.wo = Linear(width_q, cfg.hidden_size, bias=cfg.attention_bias)
        normed = cfg.family in ("qwen3", "qwen3_moe")
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps) if normed else nn.Identity()
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
        """[T, D] -> [T, D]. No token sees another document; with `cache`, also the tokens of earlier calls.

        With an `exchange`, x holds a slice of the `total_tokens` that cu_seqlens and max_seqlen describe.
        """
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)) for p in linear_qkv(x_TD, self.wq, self.wk, self.wv))
        q, k = _positioned(q, self.q_norm, rotary), _positioned(k, self.k_norm, rotary)
        cu_k, max_k = cu_seqlens, max_seqlen
        if cache is not None:
            k, v, cu_k, max_k = cache.append(self.layer, (k, v), cu_seqlens)
        if self.exchange is not None:
            q = self.exchange.to_heads(q, total_tokens)
            k = self.exchange.to_heads(k, total_tokens)
            v = self.exchange.to_heads(v, total_tokens)
        out = ops.attention(q, k, v, cu_seqlens, cu_k, max_seqlen, max_k)
        if self.exchange is not None:
            out = self.exchange.to_tokens(out)
        return self.wo(out.flatten(1))


def _positioned(x_THD: Tensor, norm: nn.Module, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Each head normalised where the family does, then turned."""
    if isinstance(norm, RMSNorm):
        return ops.rms_norm_rotary(x_THD, norm.weight, *rotary, norm.eps)
    return ops.rotary(x_THD, *rotary)
