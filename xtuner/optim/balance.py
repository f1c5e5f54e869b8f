"""Load balancing without a loss: a bias per expert that only the choice of experts sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtuner.nn.router import Router


@torch.no_grad()
def update_choice_bias(model: nn.Module, counts_LE: Tensor, rate: float) -> None:
    """Raise the bias of experts that got less than the mean of their layer by `rate`, lower that of the others.

    Wang et al. 2024 (arXiv 2408.15664, algorithm 1), as in DeepSeek-V3.

    Args:
        counts_LE: choices per expert in the step just done, of all ranks, one row per MoE layer in the model's order.

    Raises:
        ValueError: a row for every router with a choice bias is not there.
    """
    biases = [m.choice_bias for m in model.modules() if isinstance(m, Router) and m.choice_bias is not None]
    if len(biases) != len(counts_LE):
        raise ValueError(f"counts_LE has {len(counts_LE)} rows, the model {len(biases)} routers with a choice bias")
    for bias_E, counts_E in zip(biases, counts_LE, strict=True):
        bias_E += rate * (counts_E.mean() - counts_E).sign().to(bias_E)
