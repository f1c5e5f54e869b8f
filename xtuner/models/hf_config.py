"""The part of a Hugging Face config.json that Llama and Qwen3 share, read under its old and new field names."""

from __future__ import annotations

from typing import Any

from xtuner.config import ModelConfig, RopeConfig
from xtuner.errors import ConfigError

_PLAIN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "max_position_embeddings",
)  # fmt: skip
_OPTIONAL = ("tie_word_embeddings", "attention_bias", "initializer_range")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_decoder(hf: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a ModelConfig. Raises ConfigError on what we do not compute, rather than ignoring it."""
    _refuse_unsupported(hf)
    missing = [name for name in _PLAIN if name not in hf]
    if missing:
        raise ConfigError(f"config.json: required, but not given: {', '.join(missing)}")
    values = {name: hf[name] for name in _PLAIN}
    values |= {name: hf[name] for name in (*_OPTIONAL, *_TOKENS) if hf.get(name) is not None}
    values["num_key_value_heads"] = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    values["head_dim"] = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    values["rope"] = _read_rope(hf)
    return values


def write_decoder(cfg: ModelConfig) -> dict[str, Any]:
    """The shared fields, in today's names."""
    names = (*_PLAIN, *_OPTIONAL, *_TOKENS, "num_key_value_heads", "head_dim")
    hf = {name: getattr(cfg, name) for name in names}
    rope = {"rope_theta": cfg.rope.theta, "rope_type": cfg.rope.type}
    if cfg.rope.type != "default":
        fields = _ROPE_FIELDS if cfg.rope.type == "llama3" else _ROPE_FIELDS[:1]
        rope |= {name: getattr(cfg.rope, name) for name in fields}
    # rope_theta and rope_scaling are what readers from before rope_parameters look for.
    old = {"rope_theta": cfg.rope.theta, "rope_scaling": None if cfg.rope.type == "default" else rope}
    return hf | old | {"hidden_act": "silu", "rope_parameters": rope, "use_cache": True, "attention_dropout": 0.0}


def _read_rope(hf: dict[str, Any]) -> RopeConfig:
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"config.json: rope_type={kind}: supported are default, linear, llama3")
    theta = given.get("rope_theta", hf.get("rope_theta", 10_000.0))
    fields = {name: given[name] for name in _ROPE_FIELDS if given.get(name) is not None} if kind != "default" else {}
    return RopeConfig(theta=theta, type=kind, **fields)


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act={hf['hidden_act']}: supported is silu")
    if hf.get("use_sliding_window"):
        raise ConfigError("config.json: use_sliding_window=true: sliding-window attention is not supported")
    if hf.get("mlp_bias"):
        raise ConfigError("config.json: mlp_bias=true: biases in the feed-forward layer are not supported")
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        factor = hf["partial_rotary_factor"]
        raise ConfigError(f"config.json: partial_rotary_factor={factor}: supported is 1.0")
