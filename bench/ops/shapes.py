"""The shapes grouped products are measured on: the experts of released models, true to N and K, with fewer experts.

Sizes are those of the models' own config.json files: hidden_size and moe_intermediate_size (intermediate_size of
GPT-OSS). w13 maps hidden to both halves of the gated activation, w2 maps back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ExpertShape(NamedTuple):
    """A grouped product x [rows, k] times n x k weights of `num_experts` experts."""

    name: str
    num_experts: int
    n: int
    k: int


EXPERTS = [
    ExpertShape("Qwen3-30B-A3B w13", 8, 2 * 768, 2048),
    ExpertShape("Qwen3-30B-A3B w2", 8, 2048, 768),
    ExpertShape("GPT-OSS w13", 8, 2 * 2880, 2880),
    ExpertShape("GPT-OSS w2", 8, 2880, 2880),
    ExpertShape("DeepSeek-V3 w13", 8, 2 * 2048, 7168),
    ExpertShape("DeepSeek-V3 w2", 8, 7168, 2048),
]
MEAN_ROWS = [8, 32, 128, 512]  # rows per expert
LOADS = ["balanced", "zipf1.2"]


def row_offsets(num_experts: int, mean_rows: int, load: str) -> torch.Tensor:
    """int64 [E+1]: equal groups, or rows drawn by a Zipf law with exponent 1.2 over the experts (fixed seed)."""
    total = num_experts * mean_rows
    if load == "balanced":
        return torch.arange(0, total + 1, mean_rows)
    share = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -1.2
    expert = torch.multinomial(share, total, replacement=True, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(expert, minlength=num_experts).cumsum(0)])
