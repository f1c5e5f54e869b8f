"""How much arithmetic a token costs."""

from __future__ import annotations

from xtuner.config import ModelConfig


def flops_per_token(cfg: ModelConfig, context: int) -> float:
    """Floating-point operations of one training token (forward and backward, no recomputation).

    6 per weight that takes part in a matrix product, plus 12 * context / 2 per attention channel and layer for causal
    scores and values over documents of `context` tokens (PaLM, Chowdhery et al. 2022, appendix B).
    """
    attention, channels = _attention(cfg)
    dense = 3 * cfg.hidden_size * cfg.intermediate_size
    weights = cfg.vocab_size * cfg.hidden_size
    for layer in range(cfg.num_hidden_layers):
        weights += attention
        if cfg.moe is None or layer in cfg.dense_layers:
            weights += dense
        else:
            expert = 3 * cfg.hidden_size * cfg.moe.moe_intermediate_size
            visited = cfg.moe.num_experts_per_tok + cfg.moe.num_shared_experts
            weights += visited * expert + cfg.hidden_size * cfg.moe.num_experts
    return 6.0 * weights + 3.0 * cfg.num_hidden_layers * channels * context


def _attention(cfg: ModelConfig) -> tuple[int, int]:
    """A layer's weights in projections, and its channels in scores and values together."""
    heads = cfg.num_attention_heads
    if cfg.mla is None:
        width = heads * cfg.head_dim
        return cfg.hidden_size * (2 * width + 2 * cfg.num_key_value_heads * cfg.head_dim), 2 * width
    mla, width_qk = cfg.mla, cfg.mla.qk_nope_head_dim + cfg.mla.qk_rope_head_dim
    rank = mla.q_lora_rank
    queries = cfg.hidden_size * heads * width_qk if rank is None else rank * (cfg.hidden_size + heads * width_qk)
    keys = cfg.hidden_size * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    values = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + keys + values + heads * mla.v_head_dim * cfg.hidden_size, heads * (width_qk + mla.v_head_dim)
