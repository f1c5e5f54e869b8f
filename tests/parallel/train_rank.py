"""What each rank of the tests of whole runs does."""

from __future__ import annotations

from typing import Any

from xtuner import ops
from xtuner.config import TrainConfig
from xtuner.engine.trainer import train


def run(config: dict[str, Any], resume: bool = False) -> float:
    """Train; returns the smallest gap between the last chosen and the first rejected expert's probability."""
    smallest, topk_softmax = [], ops.topk_softmax

    def probing(logits, k, *args):
        ordered = logits.detach().softmax(-1).sort(-1, descending=True).values
        smallest.extend((ordered[:, k - 1] - ordered[:, k]).tolist())
        return topk_softmax(logits, k, *args)

    ops.topk_softmax = probing
    try:
        train(TrainConfig.parse(config), resume=resume)
    finally:
        ops.topk_softmax = topk_softmax
    return min(smallest)  # fails where the router no longer goes through the op: adapt this probe
