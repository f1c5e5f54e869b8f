"""Clipping by the global gradient norm, over any mixture of sharded and plain parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, reduce_sum: Callable[[Tensor], Tensor]
) -> float:
    """Scale the gradients so that their global L2 norm is at most `max_norm`; return the norm before clipping.

    torch's own function cannot mix parameters of different meshes, hence the sum over local shards here. A norm that
    is not finite is returned as it is and leaves the gradients alone: the caller skips the step.

    Args:
        reduce_sum: sums a tensor over all ranks.
    """
    whole = [p.grad for p in parameters if p.grad is not None]
    grads = [_local(grad) for grad in whole]
    norms = torch.stack(torch._foreach_norm(grads)).double()
    copies = norms.new_tensor([_copies(grad) for grad in whole])
    total = reduce_sum((norms.square() / copies).sum()).sqrt().item()
    if total > max_norm and total < float("inf"):
        torch._foreach_mul_(grads, max_norm / total)
    return total


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _copies(grad: Tensor) -> int:
    """How many ranks hold the same shard."""
    if not isinstance(grad, DTensor):
        return 1
    axes = enumerate(grad.placements)
    return math.prod(grad.device_mesh.size(axis) for axis, placement in axes if placement.is_replicate())
