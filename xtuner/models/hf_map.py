"""How our parameters and a Hugging Face checkpoint's tensors correspond: data that reads both ways.

Every one of our parameters is some checkpoint tensors stacked along dim 0, so the whole map is
`our name -> [Part(hf name, first row, number of rows), …]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from xtuner.config import ModelConfig


class Part(NamedTuple):
    """Rows [row_start, row_start + num_rows) of our parameter are exactly the checkpoint tensor `hf_name`."""

    hf_name: str
    row_start: int
    num_rows: int


NameMap = dict[str, list[Part]]


def stack(*tensors: tuple[str, int]) -> list[Part]:
    """Parts of tensors (hf name, rows) that follow each other."""
    parts, row = [], 0
    for name, rows in tensors:
        parts.append(Part(name, row, rows))
        row += rows
    return parts


def decoder_map(cfg: ModelConfig, attention: Callable[[ModelConfig, str, str], NameMap] | None = None) -> NameMap:
    """The map of all families; `attention` maps one layer's, None: grouped-query attention's."""
    attention = attention or _attention
    names: NameMap = {"embed.weight": stack(("model.embed_tokens.weight", cfg.vocab_size))}
    for layer in range(cfg.num_hidden_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        names |= attention(cfg, f"{ours}.attn", f"{theirs}.self_attn")
        names[f"{ours}.attn_norm.weight"] = stack((f"{theirs}.input_layernorm.weight", cfg.hidden_size))
        names[f"{ours}.mlp_norm.weight"] = stack((f"{theirs}.post_attention_layernorm.weight", cfg.hidden_size))
        if cfg.moe is None or layer in cfg.dense_layers:
            names |= _mlp(cfg, f"{ours}.mlp", f"{theirs}.mlp")
        else:
            names |= _moe(cfg, f"{ours}.moe", f"{theirs}.mlp")
    names["norm.weight"] = stack(("model.norm.weight", cfg.hidden_size))
    if not cfg.tie_word_embeddings:
        names["head.weight"] = stack(("lm_head.weight", cfg.vocab_size))
    return names


def _attention(cfg: ModelConfig, ours: str, theirs: str) -> NameMap:
    width_q, width_kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    names: NameMap = {}
    for letter, rows in (("q", width_q), ("k", width_kv), ("v", width_kv), ("o", cfg.hidden_size)):
        names[f"{ours}.w{letter}.weight"] = stack((f"{theirs}.{letter}_proj.weight", rows))
        if cfg.attention_bias:
            names[f"{ours}.w{letter}.bias"] = stack((f"{theirs}.{letter}_proj.bias", rows))
    if cfg.family != "llama":
        for letter in "qk":
            names[f"{ours}.{letter}_norm.weight"] = stack((f"{theirs}.{letter}_norm.weight", cfg.head_dim))
    return names


def _mlp(cfg: ModelConfig, ours: str, theirs: str) -> NameMap:
    rows = cfg.intermediate_size
    return {
        f"{ours}.w13": stack((f"{theirs}.gate_proj.weight", rows), (f"{theirs}.up_proj.weight", rows)),
        f"{ours}.w2": stack((f"{theirs}.down_proj.weight", cfg.hidden_size)),
    }


def _moe(cfg: ModelConfig, ours: str, theirs: str) -> NameMap:
    experts = [f"{theirs}.experts.{e}" for e in range(cfg.moe.num_experts)]
    rows = cfg.moe.moe_intermediate_size
    gates_and_ups = [(f"{e}.{kind}_proj.weight", rows) for e in experts for kind in ("gate", "up")]
    names = {
        f"{ours}.gate.weight": stack((f"{theirs}.gate.weight", cfg.moe.num_experts)),
        f"{ours}.w13": stack(*gates_and_ups),
        f"{ours}.w2": stack(*((f"{e}.down_proj.weight", cfg.hidden_size) for e in experts)),
    }
    if cfg.moe.scoring == "sigmoid":
        bias = stack((f"{theirs}.gate.e_score_correction_bias", cfg.moe.num_experts))
        names[f"{ours}.gate.choice_bias"] = bias
    if cfg.moe.num_shared_experts:
        shared = cfg.moe.num_shared_experts * rows
        parts = [(f"{theirs}.shared_experts.{kind}_proj.weight", shared) for kind in ("gate", "up")]
        names[f"{ours}.shared.w13"] = stack(*parts)
        names[f"{ours}.shared.w2"] = stack((f"{theirs}.shared_experts.down_proj.weight", cfg.hidden_size))
    return names
