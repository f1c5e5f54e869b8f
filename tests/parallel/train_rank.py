"""What each rank of the tests of whole runs does."""

from __future__ import annotations

from typing import Any

import torch

from xtuner.config import TrainConfig
from xtuner.engine.trainer import train


def run(config: dict[str, Any], resume: bool = False) -> float:
    """Train; returns the smallest gap between the last chosen and the first rejected expert's probability."""
    smallest, topk = [1.0], torch.topk

    def probing_topk(scores, k, *args, **kwargs):
        assert scores.ndim == 2 and k < scores.shape[-1], "not the router's call"
        ordered = scores.sort(-1, descending=True).values
        gaps = ordered[:, k - 1] - ordered[:, k]
        smallest.append(gaps.min().item() if gaps.numel() else 1.0)
        return topk(scores, k, *args, **kwargs)

    torch.topk = probing_topk
    try:
        train(TrainConfig.parse(config), resume=resume)
    finally:
        torch.topk = topk
    assert len(smallest) > 1, "the router no longer goes through torch.topk: adapt this probe"
    return min(smallest)
