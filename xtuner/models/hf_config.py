"""The part of a Hugging Face config.json that Llama and Qwen3 share, read under its old and new field names."""

from __future__ import annotations

from typing import Any

from xtuner.config import ModelConfig
from xtuner.errors import ConfigError

_PLAIN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "max_position_embeddings",
)  # fmt: skip
_OPTIONAL = ("tie_word_embeddings", "attention_bias", "initializer_range")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What each kind of rotary embedding needs besides its base.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


# What it may say besides; null and 0 both mean the default.
_ROPE_OPTIONS = {"yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}


def read_decoder(hf: dict[str, Any]) -> dict[str, Any]:
    """Field values of a ModelConfig. Raises ConfigError on what we do not compute, rather than ignoring it."""
    _refuse_unsupported(hf)
    require(hf, *_PLAIN)
    values = {name: hf[name] for name in _PLAIN}
    values |= {name: hf[name] for name in (*_OPTIONAL, *_TOKENS) if hf.get(name) is not None}
    values["num_key_value_heads"] = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    values["head_dim"] = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    values["rope"] = _read_rope(hf)
    return values


def require(hf: dict[str, Any], *names: str) -> None:
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise ConfigError(f"config.json: required, but not given: {', '.join(missing)}")


def write_decoder(cfg: ModelConfig) -> dict[str, Any]:
    """The shared fields, in today's names."""
    names = (*_PLAIN, *_OPTIONAL, *_TOKENS, "num_key_value_heads", "head_dim")
    hf = {name: getattr(cfg, name) for name in names}
    rope = {"rope_theta": cfg.rope.theta, "rope_type": cfg.rope.type}
    rope |= {name: getattr(cfg.rope, name) for name in _ROPE_FIELDS[cfg.rope.type]}
    options = {name: getattr(cfg.rope, name) for name in _ROPE_OPTIONS.get(cfg.rope.type, ())}
    rope |= {name: value for name, value in options.items() if value}
    # rope_theta and rope_scaling are what readers from before rope_parameters look for.
    old = {"rope_theta": cfg.rope.theta, "rope_scaling": None if cfg.rope.type == "default" else rope}
    return hf | old | {"hidden_act": "silu", "rope_parameters": rope, "use_cache": True, "attention_dropout": 0.0}


def _read_rope(hf: dict[str, Any]) -> dict[str, Any]:
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_FIELDS:
        raise ConfigError(f"config.json: rope_type={kind}: supported are {', '.join(_ROPE_FIELDS)}")
    _refuse_other_than(given, "partial_rotary_factor", 1.0)
    if kind == "yarn":
        _refuse_other_than(given, "attention_factor", None)
        _refuse_other_than(given, "truncate", True)
    require(given, *_ROPE_FIELDS[kind])
    theta = given.get("rope_theta", hf.get("rope_theta", 10_000.0))
    options = {name: given[name] for name in _ROPE_OPTIONS.get(kind, ()) if given.get(name)}
    return {"theta": theta, "type": kind, **{name: given[name] for name in _ROPE_FIELDS[kind]}, **options}


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    _refuse_other_than(hf, "hidden_act", "silu")
    _refuse_other_than(hf, "partial_rotary_factor", 1.0)
    windowed = any(kind != "full_attention" for kind in hf.get("layer_types") or ())
    if hf.get("use_sliding_window") or windowed:
        field = "layer_types" if windowed else "use_sliding_window"
        raise ConfigError(f"config.json: {field}={hf[field]}: only full attention is supported")
    if hf.get("mlp_bias"):
        raise ConfigError("config.json: mlp_bias=true: biases in the feed-forward layer are not supported")


def _refuse_other_than(hf: dict[str, Any], field: str, supported: Any) -> None:
    """Absent and null mean the default, which is what we compute."""
    if hf.get(field) not in (None, supported):
        raise ConfigError(f"config.json: {field}={hf[field]}: supported is {supported}")
