"""What each rank of the conversion test does."""

from __future__ import annotations

from pathlib import Path

import torch

from xtuner.checkpoint.dcp import save_checkpoint
from xtuner.config import ModelConfig, ParallelConfig
from xtuner.models import build_model
from xtuner.parallel import build_layout, init_world, leave_world, parallelize


def make_arch(num_layers):
    """Experts of 8 and 4 MiB per layer, as one parameter each."""
    return {
        "family": "qwen3_moe", "vocab_size": 300, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "moe": {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    }  # fmt: skip


def save_sharded(root: Path, num_layers: int) -> None:
    """On each of four ranks, experts split over two: a fresh model, each rank writing its own shards."""
    world = init_world("cpu", num_threads=1)
    try:
        arch, cfg = ModelConfig.parse(make_arch(num_layers)), ParallelConfig(ep_size=2)
        model = parallelize(build_model(arch, "meta"), build_layout(cfg, arch, world), cfg, world)
        model.to_empty(device="cpu")
        model.init_weights(0)
        without_state = torch.optim.SGD(model.parameters(), lr=1.0)
        save_checkpoint(root / "checkpoints", 1, model, without_state, {"arch": arch.model_dump(mode="json")}, 1)
    finally:
        leave_world()
