"""Training against routing that overloads one rank after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.parallel.layout_rank import ALL_LOSSES, ARCH, build
from xtuner.batch import Batch
from xtuner.config import OptimConfig
from xtuner.data import collate
from xtuner.data.dataset import Pack
from xtuner.engine.train_step import train_step
from xtuner.optim import build_adamw
from xtuner.parallel import leave_world

PACKS, TOKENS = 4, 48  # of a step, and of a pack
MOE_LAYERS, TOP_K, EXPERTS = 2, ARCH.moe.num_experts_per_tok, ARCH.moe.num_experts


def draw_packs(step: int, steps: int) -> list[Batch]:
    """All tokens to one expert (and its neighbour on the same rank, since two are chosen), to others, then anywhere."""
    rng = np.random.default_rng(step)
    phase, batches = 4 * step // steps, []
    for _ in range(PACKS):
        ids = rng.integers(0, ARCH.vocab_size, TOKENS).astype(np.int32)
        batch = collate([Pack([ids], [np.ones(TOKENS, np.uint8)])])
        routing = rng.random((TOKENS, MOE_LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K]
        if phase == 0:
            routing[:] = (0, 1)
        if phase == 1:
            routing[:] = (7, 6)
            routing[::7] = (2, 5)
        batches.append(replace(batch, routing=torch.from_numpy(routing.astype(np.int32))))
    return batches


def join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    fields = {
        name: torch.cat([getattr(b, name) for b in batches])
        for name in ("input_ids", "labels", "loss_weights", "routing")
    }
    ends = torch.arange(len(batches) + 1, dtype=torch.int32) * TOKENS
    return replace(batches[0], positions=torch.cat([b.positions for b in batches], 1), cu_seqlens=ends, **fields)


def train(fields: dict[str, Any], steps: int) -> tuple[list[float], int, list[int]]:
    """Losses; the most rows that this rank's experts ever held; bytes of shared memory it had used after each step."""
    world, model, layout = build(fields)
    try:
        model.init_weights(seed=0)
        optimizer = build_adamw(model, OptimConfig(lr=1e-3))
        rows, losses, reached = [0], [], []
        for layer in model.layers:
            if layer.is_moe:
                layer.moe.experts = watch(layer.moe.experts, rows)
        dispatcher = next(layer.moe.dispatcher for layer in model.layers if layer.is_moe)
        for step in range(steps):
            packs = draw_packs(step, steps)
            share = PACKS // layout.data_size
            batch = join(packs[layout.data_rank * share : (layout.data_rank + 1) * share])
            losses.append(train_step(model, optimizer, [batch], ALL_LOSSES, 1.0, world).loss)
            reached.append(dispatcher.group.memory.reached if hasattr(dispatcher, "group") else 0)
        return losses, max(rows), reached
    finally:
        leave_world()


def watch(experts, rows: list[int]):
    def watched(tokens):
        rows.append(tokens.x.shape[0])
        return experts(tokens)

    return watched
