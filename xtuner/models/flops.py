"""How much arithmetic a token costs."""

from __future__ import annotations

from xtuner.config import ModelConfig


def flops_per_token(cfg: ModelConfig, context: int) -> float:
    """Floating-point operations of one training token (forward and backward, no recomputation).

    6 per weight that takes part in a matrix product, plus 12 * context / 2 per attention channel and layer for causal
    scores and values over documents of `context` tokens (PaLM, Chowdhery et al. 2022, appendix B).
    """
    heads = cfg.num_attention_heads * cfg.head_dim
    attention = cfg.hidden_size * (2 * heads + 2 * cfg.num_key_value_heads * cfg.head_dim)
    dense = 3 * cfg.hidden_size * cfg.intermediate_size
    weights = cfg.vocab_size * cfg.hidden_size
    for layer in range(cfg.num_hidden_layers):
        weights += attention
        if cfg.moe is None or layer in cfg.dense_layers:
            weights += dense
        else:
            expert = 3 * cfg.hidden_size * cfg.moe.moe_intermediate_size
            weights += cfg.moe.num_experts_per_tok * expert + cfg.hidden_size * cfg.moe.num_experts
    return 6.0 * weights + 6.0 * cfg.num_hidden_layers * heads * context
