"""The recipe by which one model becomes this rank's part of it."""

from __future__ import annotations

from torch import nn

from xtuner.config import ParallelConfig
from xtuner.parallel.expert import make_dispatcher, split_experts
from xtuner.parallel.fsdp import shard_model
from xtuner.parallel.layout import Layout
from xtuner.parallel.sequence import split_sequences
from xtuner.parallel.world import World


def parallelize(model: nn.Module, layout: Layout, cfg: ParallelConfig, world: World) -> nn.Module:
    """Lay `model` out over the ranks, in place. It may be on the meta device: no rank need ever hold the whole."""
    if layout.sp is not None:
        split_sequences(model, layout)
    if layout.ep is not None:
        split_experts(model, layout, make_dispatcher(cfg, layout, world))
    shard_model(model, layout, cfg)
    return model
