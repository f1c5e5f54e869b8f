"""The dense feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtuner import ops


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020). w13 [2I, D] holds gate rows, then up rows; w2 is [D, I]."""

    fp8 = False

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.stacked = {"w13": 2}  # matrices in one parameter
        self.w13 = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(hidden_size, intermediate_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.fp8:
            return ops.linear_fp8(ops.linear_fp8(x_TD, self.w13), self.w2, gated=True)
        return ops.linear(ops.swiglu(ops.linear(x_TD, self.w13)), self.w2)
