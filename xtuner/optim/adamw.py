"""AdamW with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from xtuner.config import OptimConfig


def build_adamw(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019, decoupled decay) in two groups.

    Matrices (expert stacks included) decay; vectors — norm scales and biases — do not, since shrinking a scale
    towards zero is no regularisation of the function it computes.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
