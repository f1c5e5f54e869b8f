"""What each rank of the Muon test does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.parallel.layout_rank import ALL_LOSSES, ARCH, PACKS, build, make_model, make_packs
from xtuner.checkpoint.dcp import load_checkpoint, save_checkpoint
from xtuner.checkpoint.hf import load_hf
from xtuner.config import OptimConfig
from xtuner.data import Loader
from xtuner.engine.train_step import train_step
from xtuner.models import hf_map
from xtuner.optim import build_optimizer
from xtuner.parallel import World, leave_world, whole

MUON = OptimConfig(kind="muon", lr=0.01)


def _steps(model, optimizer, world, data_rank, data_size, slice_batch, steps: range) -> None:
    for step in steps:
        loader = Loader(
            make_packs(step), global_batch_size=PACKS, micro_batch_size=PACKS // data_size, rank=data_rank,
            world_size=data_size, shuffle=False,
        )  # fmt: skip
        train_step(model, optimizer, [slice_batch(b) for b in loader.next_step()], ALL_LOSSES, 1.0, world)


def plain(steps: int) -> dict[str, torch.Tensor]:
    """All weights after `steps` steps on one process without sharding."""
    model = make_model()
    optimizer = build_optimizer(model, MUON)
    _steps(model, optimizer, World(0, 0, 1, 1, torch.device("cpu")), 0, 1, lambda batch: batch, range(steps))
    return {name: p.detach() for name, p in model.named_parameters()}


def in_layout(
    fields: dict[str, Any], steps: range, weights: Path, load: Path | None = None, save: Path | None = None
) -> dict[str, Any] | None:
    """All weights after `steps`, on rank 0; before them a checkpoint is loaded, after them one is saved."""
    world, model, layout = build(fields)
    try:
        load_hf(model, hf_map(ARCH), weights)
        optimizer = build_optimizer(model, MUON)
        arch = ARCH.model_dump(mode="json")
        if load:
            load_checkpoint(load, model, optimizer, arch)
        _steps(model, optimizer, world, layout.data_rank, layout.data_size, layout.slice, steps)
        if save:
            save_checkpoint(save, steps.stop, model, optimizer, {"arch": arch}, keep_last=1)
        values = {name: whole(p).numpy().copy() for name, p in model.named_parameters()}
        return values if world.is_main else None
    finally:
        leave_world()
