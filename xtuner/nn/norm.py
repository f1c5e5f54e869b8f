"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtuner import ops


class RMSNorm(nn.Module):
    """weight * x / rms(x) over the last dim (Zhang & Sennrich 2019); statistics in float32, result in x's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
