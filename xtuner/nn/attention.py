"""Grouped-query attention over packed documents."""

from __future__ import annotations

from torch import Tensor, nn

from xtuner import ops
from xtuner.config import ModelConfig
from xtuner.nn.kv_cache import KVCache
from xtuner.nn.linear import Linear
from xtuner.nn.norm import RMSNorm


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

    def forward(
        self,
        x_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D]. No token sees another document; with `cache`, also the tokens of earlier calls."""
        q, k, v = (w(x_TD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = ops.rotary(self.q_norm(q), *rotary), ops.rotary(self.k_norm(k), *rotary)
        cu_k, max_k = cu_seqlens, max_seqlen
        if cache is not None:
            k, v, cu_k, max_k = cache.append(self.layer, k, v, cu_seqlens)
        out = ops.attention(q, k, v, cu_seqlens, cu_k, max_seqlen, max_k)
        return self.wo(out.flatten(1))
