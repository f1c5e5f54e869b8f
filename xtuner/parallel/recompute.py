"""Activation checkpointing (Chen et al. 2016): a block keeps its input and computes the rest again in backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from xtuner.config import MemoryConfig
from xtuner.parallel.offload import HostStash

# Whose outputs selective checkpointing keeps: attention's cost grows with the square of a document's length.
_COSTLY = (torch.ops.xtuner.attention.default,)


def recompute_blocks(model: nn.Module, cfg: MemoryConfig) -> nn.Module:
    """Let the first `cfg.checkpointing_ratio` of `model.layers` recompute in backward, in place.

    Works under FSDP2: its hooks surround a block's `forward`, so that recomputation finds the weights gathered.
    """
    if cfg.checkpointing == "none":
        return model
    stash = HostStash() if cfg.offload_activations else None
    count = math.ceil(cfg.checkpointing_ratio * len(model.layers))
    for index, layer in enumerate(model.layers[:count]):
        # Backward wants the last block's input at once.
        its_stash = stash if index < len(model.layers) - 1 else None
        layer.forward = partial(_recomputed, layer.forward, cfg.checkpointing == "selective", its_stash)
    return model


def _recomputed(
    forward: Callable, selective: bool, stash: HostStash | None, x_TD: Tensor, *args: Any, topk_idx: Tensor | None
) -> Any:
    """What `forward`, a block's, returns. Routing is decided once: recomputation is given the experts first chosen.

    A choice made anew could differ where two experts tie within rounding, and gradients would be another function's.
    """
    if not torch.is_grad_enabled():
        return forward(x_TD, *args, topk_idx=topk_idx)

    def run(x_TD: Tensor, *args: Any) -> Any:
        nonlocal topk_idx
        y_TD, stats = forward(x_TD, *args, topk_idx=topk_idx)
        if stats is not None:
            topk_idx = stats.topk_idx
        return y_TD, stats

    context = {"context_fn": _keep_costly} if selective else {}
    with stash.keep(x_TD) if stash is not None else nullcontext():
        return checkpoint(run, x_TD, *args, use_reentrant=False, preserve_rng_state=False, **context)


def _keep_costly() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of the forward pass, which keeps what `_COSTLY` operators return, and of recomputation, which takes."""
    kept: list[tuple[Tensor, ...]] = []
    return _Keep(kept), _Take(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: list[tuple[Tensor, ...]]):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _COSTLY:
            self.kept.append(tuple(x.detach() for x in out))
        return out


class _Take(_Keep):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _COSTLY:
            return self.kept.pop(0)
        return func(*args, **(kwargs or {}))
