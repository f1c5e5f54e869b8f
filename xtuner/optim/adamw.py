"""AdamW with weight decay on matrices only."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from xtuner.config import OptimConfig


def build_adamw(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019, decoupled decay).

    Matrices (expert stacks included) decay; vectors — norm scales and biases — do not, since shrinking a scale
    towards zero is no regularisation of the function it computes. One group may only hold parameters of one mesh.
    """
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for param in model.parameters():
        if param.requires_grad:
            groups[param.ndim >= 2, getattr(param, "device_mesh", None)].append(param)
    decayed = [
        {"params": params, "weight_decay": cfg.weight_decay if decays else 0.0}
        for (decays, _), params in groups.items()
    ]
    return torch.optim.AdamW(decayed, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
