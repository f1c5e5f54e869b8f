"""Llama and everything of its shape (SmolLM2, for one)."""

from __future__ import annotations

from typing import Any

from xtuner.config import ModelConfig, RopeConfig
from xtuner.models.hf_config import read_decoder, write_decoder
from xtuner.models.hf_map import decoder_map

SIZES = {
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m": ModelConfig(
        family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope=RopeConfig(theta=100_000.0),
        tie_word_embeddings=True, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        initializer_range=1 / 24,
    ),
    "llama-tiny": ModelConfig(
        family="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    ),
}  # fmt: skip


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig.parse({"family": "llama", **read_decoder(hf)})


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, **write_decoder(cfg)}


hf_map = decoder_map
