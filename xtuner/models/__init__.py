"""Model families: sizes, configuration and checkpoint names of each, over one decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from xtuner.config import ModelConfig
from xtuner.errors import CheckpointError, ConfigError
from xtuner.models import deepseek_v3, llama, qwen3, qwen3_moe
from xtuner.models.decoder import Decoder, ModelOutput
from xtuner.models.flops import flops_per_token
from xtuner.models.hf_map import NameMap, Part

_FAMILIES = {"llama": llama, "qwen3": qwen3, "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}

SIZES: dict[str, ModelConfig] = {name: cfg for family in _FAMILIES.values() for name, cfg in family.SIZES.items()}

__all__ = [
    "SIZES", "Decoder", "ModelOutput", "NameMap", "Part", "build_model", "config_from_hf", "config_to_hf",
    "flops_per_token", "hf_map",
]  # fmt: skip


def build_model(cfg: ModelConfig, device: torch.device | str = "cpu") -> Decoder:
    """A decoder with uninitialised float32 weights on `device` ("meta": without memory)."""
    with torch.device(device):
        return Decoder(cfg)


def config_from_hf(source: Path | str | dict[str, Any]) -> ModelConfig:
    """The architecture in a Hugging Face directory, or in the contents of its config.json.

    Raises:
        CheckpointError: no readable config.json. ConfigError: a model type or feature we do not compute.
    """
    if not isinstance(source, dict):
        path = Path(source) / "config.json"
        try:
            source = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path}: not a readable Hugging Face config ({e})") from None
    family = source.get("model_type")
    if family not in _FAMILIES:
        raise ConfigError(f"config.json: model_type={family}: supported are {', '.join(_FAMILIES)}")
    return _FAMILIES[family].from_hf_config(source)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json that transformers loads this architecture from."""
    return _FAMILIES[cfg.family].to_hf_config(cfg)


def hf_map(cfg: ModelConfig) -> NameMap:
    """Which checkpoint tensors make up each of our parameters."""
    return _FAMILIES[cfg.family].hf_map(cfg)
