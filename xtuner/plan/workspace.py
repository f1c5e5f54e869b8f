"""Memory that an operator takes and gives back inside itself, which no one sees from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from xtuner.ops.linear_cross_entropy import rows_at_a_time


def workspace_bytes(func: torch._ops.OpOverload, args: Sequence[Any]) -> int:
    size_of = _WORKSPACES.get(func)
    return size_of(*args) if size_of is not None else 0


def _linear_cross_entropy(hidden, weight, labels, loss_weights, want_dhidden: bool, want_dweight: bool) -> int:
    """A part's logits, and the sum of the weight's gradient in float32 where that is not the result itself."""
    logits = min(hidden.shape[0], rows_at_a_time(weight.shape[0])) * weight.shape[0] * hidden.element_size()
    total = 4 * weight.numel() if want_dweight and weight.dtype != torch.float32 else 0
    return logits + total


_WORKSPACES: dict[torch._ops.OpOverload, Callable[..., int]] = {
    torch.ops.xtuner.linear_cross_entropy.default: _linear_cross_entropy,
}
