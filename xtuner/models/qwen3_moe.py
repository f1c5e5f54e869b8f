"""Qwen3-MoE: Qwen3 attention, a mixture of experts in (nearly) every layer."""

from __future__ import annotations

from typing import Any

from xtuner.config import ModelConfig, MoEConfig, RopeConfig
from xtuner.errors import ConfigError
from xtuner.models.hf_config import read_decoder, require, write_decoder
from xtuner.models.hf_map import decoder_map

_COMMON = dict(
    family="qwen3_moe", vocab_size=151936, num_key_value_heads=4, head_dim=128, rope=RopeConfig(theta=1_000_000.0),
    max_position_embeddings=40960, bos_token_id=151643, eos_token_id=151645,
)  # fmt: skip

# From the config.json of https://huggingface.co/Qwen/Qwen3-30B-A3B and Qwen3-235B-A22B.
SIZES = {
    "qwen3-30b-a3b": ModelConfig(
        **_COMMON, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        moe=MoEConfig(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
    ),
    "qwen3-235b-a22b": ModelConfig(
        **_COMMON, hidden_size=4096, intermediate_size=12288, num_hidden_layers=94, num_attention_heads=64,
        moe=MoEConfig(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536),
    ),
    "qwen3-moe-tiny": ModelConfig(
        family="qwen3_moe", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        moe=MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
    ),
}  # fmt: skip


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    num_experts = hf.get("num_local_experts", hf.get("num_experts"))
    if num_experts is None:
        raise ConfigError("config.json: required, but not given: num_experts (or num_local_experts)")
    require(hf, "num_experts_per_tok", "moe_intermediate_size", "num_hidden_layers")
    moe = {
        "num_experts": num_experts,
        "num_experts_per_tok": hf["num_experts_per_tok"],
        "moe_intermediate_size": hf["moe_intermediate_size"],
        "norm_topk_prob": hf.get("norm_topk_prob") or False,  # what transformers takes when it is absent
    }
    step, only = hf.get("decoder_sparse_step") or 1, set(hf.get("mlp_only_layers") or ())
    layers = range(hf["num_hidden_layers"])
    dense = tuple(i for i in layers if i in only or (i + 1) % step)
    return ModelConfig.parse({"family": "qwen3_moe", "moe": moe, "dense_layers": dense, **read_decoder(hf)})


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **write_decoder(cfg)} | {
        "num_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.num_experts_per_tok,
        "moe_intermediate_size": cfg.moe.moe_intermediate_size,
        "norm_topk_prob": cfg.moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(cfg.dense_layers),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
        "sliding_window": None,
    }


hf_map = decoder_map
