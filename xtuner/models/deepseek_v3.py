"""DeepSeek-V3 and its descendants (Kimi K2): latent attention, shared experts, sigmoid routing in groups."""

from __future__ import annotations

from typing import Any

from xtuner.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from xtuner.errors import ConfigError
from xtuner.models.hf_config import read_decoder, require, write_decoder
from xtuner.models.hf_map import NameMap, decoder_map, stack

_MLA = MLAConfig(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
_YARN = dict(type="yarn", original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0, mscale_all_dim=1.0)
_SIGMOID = dict(scoring="sigmoid", choice_bias=True, num_shared_experts=1, num_experts_per_tok=8)

# From the config.json of https://huggingface.co/deepseek-ai/DeepSeek-V3 and https://huggingface.co/moonshotai/Kimi-K2-Base
# (model type kimi_k2, the same architecture).
SIZES = {
    "deepseek-v3-671b": ModelConfig(
        family="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, head_dim=64, mla=_MLA, dense_layers=(0, 1, 2),
        rope=RopeConfig(theta=10_000.0, factor=40.0, mscale=1.0, **_YARN), max_position_embeddings=163840,
        bos_token_id=0, eos_token_id=1,
        moe=MoEConfig(
            **_SIGMOID, num_experts=256, moe_intermediate_size=2048, num_groups=8, topk_groups=4,
            routed_scaling_factor=2.5,
        ),
    ),
    "kimi-k2-1t": ModelConfig(
        family="deepseek_v3", vocab_size=163840, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
        num_attention_heads=64, num_key_value_heads=64, head_dim=64, mla=_MLA, dense_layers=(0,),
        rope=RopeConfig(theta=50_000.0, factor=32.0, mscale=1.0, **_YARN), max_position_embeddings=131072,
        bos_token_id=163584, eos_token_id=163585,
        moe=MoEConfig(
            **_SIGMOID, num_experts=384, moe_intermediate_size=2048, num_groups=1, topk_groups=1,
            routed_scaling_factor=2.827,
        ),
    ),
    "deepseek-v3-tiny": ModelConfig(
        family="deepseek_v3", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=8, max_position_embeddings=2048, dense_layers=(0,),
        mla=MLAConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
        moe=MoEConfig(
            scoring="sigmoid", choice_bias=True, num_shared_experts=1, num_experts=8, num_experts_per_tok=2,
            moe_intermediate_size=64, num_groups=4, topk_groups=2, routed_scaling_factor=2.5,
        ),
    ),
}  # fmt: skip

_MLA_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# theirs -> ours
_MOE_FIELDS = {
    "n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size", "n_shared_experts": "num_shared_experts",
    "n_group": "num_groups", "topk_group": "topk_groups", "routed_scaling_factor": "routed_scaling_factor",
}  # fmt: skip


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    require(hf, *_MOE_FIELDS, *_MLA_FIELDS[1:], "num_hidden_layers", "first_k_dense_replace")
    for field, supported in (("scoring_func", "sigmoid"), ("rope_interleave", True), ("moe_layer_freq", 1)):
        if hf.get(field) not in (None, supported):
            raise ConfigError(f"config.json: {field}={hf[field]}: supported is {supported}")
    moe = {ours: hf[theirs] for theirs, ours in _MOE_FIELDS.items()}
    moe |= {"scoring": "sigmoid", "choice_bias": True, "norm_topk_prob": hf.get("norm_topk_prob") is not False}
    mla = {name: hf.get(name) for name in _MLA_FIELDS}
    shared = read_decoder(hf | {"head_dim": hf["qk_rope_head_dim"]})
    dense = tuple(range(min(hf["first_k_dense_replace"], hf["num_hidden_layers"])))
    return ModelConfig.parse({"family": "deepseek_v3", "moe": moe, "mla": mla, "dense_layers": dense, **shared})


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    count = len(cfg.dense_layers)
    if cfg.dense_layers != tuple(range(count)):
        raise ConfigError(f"dense_layers={cfg.dense_layers}: config.json can only say how many come first")
    hf = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **write_decoder(cfg)}
    hf |= {theirs: getattr(cfg.moe, ours) for theirs, ours in _MOE_FIELDS.items()}
    hf |= {name: getattr(cfg.mla, name) for name in _MLA_FIELDS}
    return hf | {
        "norm_topk_prob": cfg.moe.norm_topk_prob,
        "first_k_dense_replace": count,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


def hf_map(cfg: ModelConfig) -> NameMap:
    """Layers for multi-token prediction, which follow the others in released checkpoints, are not among our names."""
    return decoder_map(cfg, _attention)


def _attention(cfg: ModelConfig, ours: str, theirs: str) -> NameMap:
    mla, heads = cfg.mla, cfg.num_attention_heads
    width_q = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    rows = {
        "wkv_a": ("kv_a_proj_with_mqa", mla.kv_lora_rank + mla.qk_rope_head_dim),
        "kv_norm": ("kv_a_layernorm", mla.kv_lora_rank),
        "wkv_b": ("kv_b_proj", heads * (mla.qk_nope_head_dim + mla.v_head_dim)),
        "wo": ("o_proj", cfg.hidden_size),
    }
    if mla.q_lora_rank is None:
        rows["wq"] = ("q_proj", width_q)
    else:
        rows["wq_a"] = ("q_a_proj", mla.q_lora_rank)
        rows["q_norm"] = ("q_a_layernorm", mla.q_lora_rank)
        rows["wq_b"] = ("q_b_proj", width_q)
    names = {f"{ours}.{name}.weight": stack((f"{theirs}.{hf}.weight", n)) for name, (hf, n) in rows.items()}
    if cfg.attention_bias:
        biased = [name for name in ("wq_a", "wkv_a", "wo") if name in rows]
        names |= {f"{ours}.{name}.bias": stack((f"{theirs}.{rows[name][0]}.bias", rows[name][1])) for name in biased}
    return names
