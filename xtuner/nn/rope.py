"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama and Qwen checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xtuner.config import RopeConfig


def inverse_frequencies(head_dim: int, cfg: RopeConfig, device: torch.device) -> Tensor:
    """float32 [head_dim / 2], radians per position.

    "linear" divides all frequencies by `factor`; "llama3" only the slow ones, with a smooth passage between (the
    Llama 3.1 release's definition); "yarn" likewise, by feature instead of frequency.
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
    if cfg.type == "yarn":
        return _yarn(freqs, head_dim, cfg)
    return freqs


def _yarn(freqs: Tensor, head_dim: int, cfg: RopeConfig) -> Tensor:
    """Slow features are stretched by `factor`, fast ones kept, with a linear passage between (Peng et al. 2023)."""

    def feature(turns: float) -> float:
        """The feature that makes so many full turns within the context of pre-training."""
        return head_dim * math.log(cfg.original_max_position_embeddings / (turns * 2 * math.pi)) / (
            2 * math.log(cfg.theta)
        )

    first = max(math.floor(feature(cfg.beta_fast)), 0)
    last = min(math.ceil(feature(cfg.beta_slow)), head_dim - 1)
    features = torch.arange(head_dim // 2, dtype=torch.float32, device=freqs.device)
    stretched = ((features - first) / max(last - first, 1e-3)).clamp(0, 1)
    return freqs / cfg.factor * stretched + freqs * (1 - stretched)


def _growth(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotation_factor(cfg: RopeConfig) -> float:
    """On cosine and sine, hence on rotated features."""
    if cfg.type != "yarn":
        return 1.0
    if cfg.mscale and cfg.mscale_all_dim:
        return _growth(cfg.factor, cfg.mscale) / _growth(cfg.factor, cfg.mscale_all_dim)
    return _growth(cfg.factor, 1.0)


def softmax_factor(cfg: RopeConfig) -> float:
    """On attention's logits, beside 1 / sqrt(width)."""
    return _growth(cfg.factor, cfg.mscale_all_dim) ** 2 if cfg.type == "yarn" else 1.0


def rotary_tables(positions_T: Tensor, head_dim: int, cfg: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, head_dim / 2] for `ops.rotary`, computed in float32."""
    angles = positions_T[:, None].float() * inverse_frequencies(head_dim, cfg, positions_T.device)
    factor = rotation_factor(cfg)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
