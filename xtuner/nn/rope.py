"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama and Qwen checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xtuner.config import RopeConfig


def inverse_frequencies(head_dim: int, cfg: RopeConfig, device: torch.device) -> Tensor:
    """float32 [head_dim / 2], radians per position.

    "linear" divides all frequencies by `factor`; "llama3" only the slow ones, with a smooth passage between (the
    Llama 3.1 release's definition).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / head_dim
    freqs = 1.0 / cfg.theta**exponents
    if cfg.type == "linear":
        return freqs / cfg.factor
    if cfg.type == "llama3":
        turns = cfg.original_max_position_embeddings * freqs / (2 * math.pi)  # full turns within the old context
        keep = (turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
        keep = keep.clamp(0, 1)
        return keep * freqs + (1 - keep) * freqs / cfg.factor
    return freqs


def rotary_tables(positions_T: Tensor, head_dim: int, cfg: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, head_dim / 2] for `ops.rotary`, computed in float32."""
    angles = positions_T[:, None].float() * inverse_frequencies(head_dim, cfg, positions_T.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)
