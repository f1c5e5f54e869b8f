"""A checkpoint of a run, finished or not, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from xtuner.checkpoint.dcp import list_checkpoints, load_checkpoint, read_state
from xtuner.checkpoint.hf import save_hf
from xtuner.config import ModelConfig, ParallelConfig, TrainConfig, load_config
from xtuner.errors import CheckpointError
from xtuner.models import build_model, config_to_hf, hf_map
from xtuner.parallel import build_layout, init_world, parallelize


def convert(checkpoint: Path, out: Path, dtype: str) -> None:
    """Write `checkpoint` (or the newest one of a run directory) to `out` as safetensors in `dtype`.

    Raises:
        CheckpointError: `checkpoint` is neither a run directory with a checkpoint nor a checkpoint of a run.
    """
    if list_checkpoints(checkpoint / "checkpoints"):
        checkpoint = list_checkpoints(checkpoint / "checkpoints")[-1]
    config_file = checkpoint.parent.parent / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{checkpoint}: neither a run directory with a checkpoint nor a checkpoint of a run")
    cfg = load_config(str(config_file), (), TrainConfig).config
    saved_arch = read_state(checkpoint)["arch"]
    arch = ModelConfig.parse(saved_arch)
    world = init_world("cpu", None)
    try:
        here = ParallelConfig()  # whatever the layout of the run was
        model = parallelize(build_model(arch, device="meta"), build_layout(here, arch, world), here, world)
        model.to_empty(device=world.device)
        load_checkpoint(checkpoint, model, None, saved_arch)
        tokenizer = cfg.data.tokenizer or cfg.model.path
        save_hf(
            model, hf_map(arch), out, config=config_to_hf(arch), dtype=getattr(torch, dtype), tokenizer_dir=tokenizer
        )
    finally:
        dist.destroy_process_group()
