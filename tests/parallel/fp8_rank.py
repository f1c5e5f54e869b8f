"""What each rank of the float8 tests does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.parallel.layout_rank import ALL_LOSSES, PACKS, Gradients, make_packs
from xtuner import ops
from xtuner.checkpoint.hf import load_hf
from xtuner.config import MemoryConfig, ModelConfig, ParallelConfig
from xtuner.data import Loader
from xtuner.engine.train_step import train_step
from xtuner.models import build_model, hf_map
from xtuner.nn.fp8 import use_fp8
from xtuner.parallel import build_layout, init_world, leave_world, materialize, parallelize

# Projections of 128 rows, which several ranks share; experts whose shards end between blocks.
ARCH = ModelConfig.parse({
    "family": "qwen3_moe", "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "initializer_range": 0.05, "dense_layers": (1,),
    "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
})  # fmt: skip


def step_and_codes(fields: dict[str, Any], weights: Path):
    """Figures and whole gradient of one step, and by name the gathered codes and scales of this rank's weights."""
    world = init_world("cpu", num_threads=1)
    try:
        cfg = ParallelConfig(**fields)
        layout, model = build_layout(cfg, ARCH, world), build_model(ARCH, "meta")
        use_fp8(model.layers)
        model = parallelize(model, layout, cfg, world)
        materialize(model, world, MemoryConfig())
        load_hf(model, hf_map(ARCH), weights)
        loader = Loader(
            make_packs(), global_batch_size=PACKS, micro_batch_size=PACKS // layout.data_size, rank=layout.data_rank,
            world_size=layout.data_size, shuffle=False,
        )  # fmt: skip
        gradients = Gradients(model)
        batches = [layout.slice(batch) for batch in loader.next_step()]
        result = train_step(model, gradients, batches, ALL_LOSSES, 1e9, world)
        codes = {}
        for layer in model.layers:
            layer.unshard()
        for name, param in model.layers.named_parameters():
            weight = param._local_tensor if hasattr(param, "_local_tensor") else param
            if isinstance(weight, ops.Float8Weight):
                codes[name] = weight.codes.view(torch.uint8).numpy().copy(), weight.scale.numpy().copy()
        return result.figures(), gradients.whole, codes
    finally:
        leave_world()


def make_model():
    model = build_model(ARCH)
    model.init_weights(0)
    return model


