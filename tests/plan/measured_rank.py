"""What each rank of the comparison with real runs does."""

from __future__ import annotations

from dataclasses import replace

import torch

from xtuner.config import ModelConfig, TrainConfig
from xtuner.models import build_model
from xtuner.optim import build_adamw
from xtuner.parallel import build_layout, init_world, leave_world, materialize, parallelize
from xtuner.plan.device import get_device
from xtuner.plan.simulate import planned_batch, record_steps


def peak_of_real_steps(cfg: TrainConfig, arch: ModelConfig, document: int) -> tuple[int, dict[str, int]]:
    """Device bytes at the peak, and by phase, of two real steps on random tokens."""
    world = init_world("cpu", num_threads=1)
    try:
        layout = build_layout(cfg.parallel, arch, world)
        model = parallelize(build_model(arch, "meta"), layout, cfg.parallel, world, cfg.memory)
        materialize(model, world, cfg.memory)
        model.init_weights(0)
        batch = planned_batch(cfg.data.pack_max_length, document)
        generator = torch.Generator().manual_seed(layout.data_rank)
        ids = torch.randint(arch.vocab_size, (batch.num_tokens,), generator=generator)
        batch = layout.slice(replace(batch, input_ids=ids, labels=ids.roll(-1)))
        run = record_steps(cfg, model, build_adamw(model, cfg.optim), batch, world, get_device("h100-80g"))
        return run.tracker.peak.device, dict(run.tracker.phase_peaks)
    finally:
        leave_world()
