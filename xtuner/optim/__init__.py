"""Optimizers, learning-rate schedules and the balancing of experts."""

import torch
from torch import nn

from xtuner.config import OptimConfig
from xtuner.optim.adamw import build_adamw
from xtuner.optim.balance import update_choice_bias
from xtuner.optim.clip import clip_grad_norm
from xtuner.optim.host_state import keep_state_on_host
from xtuner.optim.muon import build_muon
from xtuner.optim.schedule import learning_rate

__all__ = [
    "build_adamw", "build_muon", "build_optimizer", "clip_grad_norm", "keep_state_on_host", "learning_rate",
    "update_choice_bias",
]  # fmt: skip


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """What `cfg.kind` names. Collective."""
    return build_muon(model, cfg) if cfg.kind == "muon" else build_adamw(model, cfg)
