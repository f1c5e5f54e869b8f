"""What each rank of the memory test does: one step on one long document, its memory watched."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from xtuner.batch import Batch
from xtuner.config import LossConfig, ModelConfig, OptimConfig, ParallelConfig
from xtuner.engine.train_step import train_step
from xtuner.models import build_model
from xtuner.optim import build_adamw
from xtuner.parallel import build_layout, init_world, leave_world, parallelize

M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # of malloc.h
# As in Qwen3, most of a token's activations are those of its experts.
ARCH = ModelConfig.parse({
    "family": "qwen3_moe", "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    "moe": {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
})  # fmt: skip


def document(num_tokens: int) -> Batch:
    ids = torch.randint(0, ARCH.vocab_size, (num_tokens + 1,), generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids=ids[:-1],
        labels=ids[1:],
        loss_weights=torch.ones(num_tokens),
        positions=torch.arange(num_tokens)[None],
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        max_seqlen=num_tokens,
    )


def step_on_long_document(num_tokens: int) -> tuple[float, float]:
    """Loss, and MiB of resident memory by which the step's peak exceeds what was held before it."""
    world = init_world("cpu", num_threads=1)
    # A tensor has its pages to itself and gives them back, so that resident memory is memory in use.
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 1 << 16), mallopt(M_MMAP_THRESHOLD, 1 << 16)
    try:
        cfg = ParallelConfig(sp_size=world.size)
        layout = build_layout(cfg, ARCH, world)
        model = parallelize(build_model(ARCH, "meta"), layout, cfg, world)
        model.to_empty(device="cpu")
        model.init_weights(seed=0)
        optimizer = build_adamw(model, OptimConfig())

        def step(tokens: int) -> float:
            return train_step(model, optimizer, [layout.slice(document(tokens))], LossConfig(), 1.0, world).loss

        loss = step(64)  # optimizer state and whatever else is made once
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        loss = step(num_tokens)
        return loss, (_status("VmHWM") - before) / 1024
    finally:
        leave_world()


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])
