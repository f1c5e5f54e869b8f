"""Qwen3 dense: Llama with an RMSNorm on each query and key head."""

from __future__ import annotations

from typing import Any

from xtuner.config import ModelConfig, RopeConfig
from xtuner.models.hf_config import read_decoder, write_decoder
from xtuner.models.hf_map import decoder_map

_COMMON = dict(
    family="qwen3", vocab_size=151936, num_key_value_heads=8, head_dim=128, rope=RopeConfig(theta=1_000_000.0),
    max_position_embeddings=40960, bos_token_id=151643, eos_token_id=151645,
)  # fmt: skip

# From the config.json of https://huggingface.co/Qwen/Qwen3-0.6B and its siblings.
SIZES = {
    "qwen3-0.6b": ModelConfig(
        **_COMMON, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": ModelConfig(
        **_COMMON, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": ModelConfig(
        **_COMMON, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    ),
    "qwen3-tiny": ModelConfig(
        family="qwen3", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    ),
}  # fmt: skip


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig.parse({"family": "qwen3", **read_decoder(hf)})


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **write_decoder(cfg)} | {
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": cfg.num_hidden_layers,
    }


hf_map = decoder_map
