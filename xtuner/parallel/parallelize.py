"""The recipe by which one model becomes this rank's part of it."""

from __future__ import annotations

from torch import nn

from xtuner.config import MemoryConfig, ParallelConfig
from xtuner.parallel.expert import make_dispatcher, split_experts
from xtuner.parallel.fp8 import gather_in_fp8
from xtuner.parallel.fsdp import shard_model
from xtuner.parallel.layout import Layout
from xtuner.parallel.recompute import recompute_blocks
from xtuner.parallel.sequence import split_sequences
from xtuner.parallel.world import World


def parallelize(
    model: nn.Module, layout: Layout, cfg: ParallelConfig, world: World, memory: MemoryConfig | None = None
) -> nn.Module:
    """Lay `model` out over the ranks, in place. It may be on the meta device: no rank need ever hold the whole."""
    memory = memory or MemoryConfig()
    recompute_blocks(model, memory)
    if layout.sp is not None:
        split_sequences(model, layout)
    if layout.ep is not None:
        split_experts(model, layout, make_dispatcher(cfg, layout, world))
    shard_model(model, layout, cfg, memory)
    return model


def materialize(model: nn.Module, world: World, memory: MemoryConfig) -> None:
    """Give a model on the meta device memory, without values: on the device, or weights on the host."""
    model.to_empty(device="cpu" if memory.offload_parameters else world.device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(world.device))
    gather_in_fp8(model)
