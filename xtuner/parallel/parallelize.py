"""The recipe by which one model becomes this rank's part of it."""

from __future__ import annotations

from torch import nn

from xtuner.config import ParallelConfig
from xtuner.parallel.expert import split_experts
from xtuner.parallel.fsdp import shard_model
from xtuner.parallel.layout import Layout
from xtuner.parallel.sequence import split_sequences
from xtuner.parallel.world import World


def parallelize(model: nn.Module, layout: Layout, cfg: ParallelConfig, world: World) -> nn.Module:
    """Lay `model` out over the ranks, in place. It may be on the meta device: no rank need ever hold the whole."""
    if layout.sp is not None:
        split_sequences(model, layout)
    if layout.ep is not None:
        split_experts(model, layout, choose_dispatcher(cfg, world))
    shard_model(model, layout, cfg)
    return model


def choose_dispatcher(cfg: ParallelConfig, world: World) -> str:
    """`cfg.dispatcher`; or "fused" where a group's ranks share a machine's memory, "all_to_all" elsewhere."""
    if cfg.dispatcher != "auto":
        return cfg.dispatcher
    on_one_host = world.local_size % cfg.ep_size == 0
    return "fused" if on_one_host and world.device.type == "cpu" else "all_to_all"
