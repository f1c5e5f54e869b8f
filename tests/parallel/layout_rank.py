"""What each rank of the layout tests does, and the model and data that all layouts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from xtuner.checkpoint.hf import load_hf
from xtuner.config import LossConfig, MemoryConfig, ModelConfig, ParallelConfig
from xtuner.data import Loader
from xtuner.data.dataset import Pack
from xtuner.engine.train_step import train_step
from xtuner.models import build_model, hf_map
from xtuner.parallel import World, build_layout, init_world, leave_world, materialize, parallelize, whole
from xtuner.plan.tracker import MemoryTracker

# Two key/value heads for up to four sequence-parallel ranks; one dense layer.
ARCH = ModelConfig.parse({
    "family": "qwen3_moe", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "dense_layers": (1,),
    "moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
})  # fmt: skip
PACKS = 4
STARVED = (6, 7)  # experts that no token chooses
ALL_LOSSES = LossConfig(aux_loss_coef=0.05, z_loss_coef=0.02)
CROSS_ENTROPY_ALONE = LossConfig(aux_loss_coef=0.0, z_loss_coef=0.0)


def make_model(seed: int = 0) -> nn.Module:
    """Plain and whole. Routers favour some experts and never choose the starved ones: every token has a common
    direction, to which they answer."""
    model = build_model(ARCH)
    model.init_weights(seed)
    direction = torch.where(torch.arange(ARCH.hidden_size) % 2 == 0, 1.0, -1.0)
    liking = torch.tensor([3.0, 1.5, 0.5, 0.0, 0.0, 0.0, -60.0, -60.0])
    with torch.no_grad():
        model.embed.weight += direction
        for layer in model.layers:
            # Values do not see it: gradients of queries and keys are differences between them, not what they share.
            wv = layer.attn.wv.weight
            wv -= torch.outer(wv @ direction, direction) / ARCH.hidden_size
            if layer.is_moe:
                layer.moe.gate.weight += torch.outer(liking, direction) / ARCH.hidden_size
    return model


def make_packs(seed: int = 4) -> list[Pack]:
    """Documents of 1 to 60 tokens in packs of unequal and odd lengths, some tokens not learned; one in two packs has a
    single document."""
    rng = np.random.default_rng(seed)
    packs = []
    for _ in range(PACKS):
        lengths = rng.integers(1, 60, rng.integers(1, 5))
        ids = [rng.integers(0, ARCH.vocab_size, n).astype(np.int32) for n in lengths]
        packs.append(Pack(ids, [(rng.random(n) < 0.8).astype(np.uint8) for n in lengths]))
    return packs


class Gradients:
    """In the optimizer's place: keeps the gradient of the step instead of using it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.whole: dict[str, np.ndarray] = {}

    def step(self) -> None:
        self.whole = {name: whole(p.grad).numpy().copy() for name, p in self.model.named_parameters()}

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none=set_to_none)


def one_step(model: nn.Module, world: World, data_rank: int, data_size: int, slice_batch, loss: LossConfig, micro: int):
    """Figures, choices per expert and whole gradient of one step on all packs, in `micro` micro-batches."""
    loader = Loader(
        make_packs(), global_batch_size=PACKS, micro_batch_size=PACKS // data_size // micro, rank=data_rank,
        world_size=data_size, shuffle=False,
    )  # fmt: skip
    gradients = Gradients(model)
    batches = [slice_batch(batch) for batch in loader.next_step()]
    assert len(batches) == micro
    result = train_step(model, gradients, batches, loss, 1e9, world)
    return result.figures(), result.expert_counts.numpy(), gradients.whole


def plain_step(loss: LossConfig):
    """Without any sharding, on one process."""
    alone = World(0, 0, 1, 1, torch.device("cpu"))
    return one_step(make_model(), alone, 0, 1, lambda batch: batch, loss, 1)


def step_in_layout(
    fields: dict[str, Any], loss: LossConfig, micro: int, weights: Path, memory: dict[str, Any] | None = None
):
    """One step of the model in directory `weights`, laid out as `fields` of ParallelConfig say."""
    world, model, layout = build(fields, memory)
    try:
        load_hf(model, hf_map(ARCH), weights)
        *result, gradient = one_step(model, world, layout.data_rank, layout.data_size, layout.slice, loss, micro)
        return *result, gradient if world.is_main else None
    finally:
        leave_world()


def reduced_gradients(weights: Path, reduce_dtype: str):
    """Of cross-entropy over all packs: the gradient summed over the ranks in `reduce_dtype`, this rank's own without
    any sharding, and the dtypes that travelled."""
    world, model, layout = build({}, {"reduce_dtype": reduce_dtype})
    try:
        load_hf(model, hf_map(ARCH), weights)
        where = layout.data_rank, layout.data_size, layout.slice, CROSS_ENTROPY_ALONE, 1
        with _Reductions() as reductions:
            *_, total = one_step(model, world, *where)
        *_, own = one_step(make_model(), world, *where)
        return total, own, reductions.dtypes
    finally:
        leave_world()


class _Reductions(MemoryTracker):
    """Watches operators for what is reduced over ranks and scattered."""

    def __enter__(self):
        self.dtypes: set[torch.dtype] = set()
        return super().__enter__()

    def observe(self, func: torch._ops.OpOverload, args: Any, result: Any) -> None:
        if func.namespace == "c10d" and "reduce_scatter" in func.__name__:
            self.dtypes |= {x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor)}


def build(fields: dict[str, Any], memory: dict[str, Any] | None = None):
    world = init_world("cpu", num_threads=1)
    cfg = ParallelConfig(**fields)
    layout = build_layout(cfg, ARCH, world)
    memory = MemoryConfig(**memory or {})
    model = parallelize(build_model(ARCH, "meta"), layout, cfg, world, memory)
    materialize(model, world, memory)
    return world, model, layout
