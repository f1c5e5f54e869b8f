"""A checkpoint of a run, finished or not, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch

from xtuner.checkpoint.dcp import list_checkpoints, read_model, read_state
from xtuner.checkpoint.hf import write_hf
from xtuner.config import ModelConfig, TrainConfig, load_config
from xtuner.errors import CheckpointError
from xtuner.models import build_model, config_to_hf, hf_map


def convert(checkpoint: Path, out: Path, dtype: str, max_bytes: int = 2 << 30) -> None:
    """Write `checkpoint` (or the newest one of a run directory) to `out` as safetensors in `dtype`.

    One process does it, whatever ran on how many; no more than `max_bytes` of the model (or one parameter) is in
    memory at a time.

    Raises:
        CheckpointError: `checkpoint` is neither a run directory with a checkpoint nor a checkpoint of a run.
    """
    if list_checkpoints(checkpoint / "checkpoints"):
        checkpoint = list_checkpoints(checkpoint / "checkpoints")[-1]
    config_file = checkpoint.parent.parent / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{checkpoint}: neither a run directory with a checkpoint nor a checkpoint of a run")
    cfg = load_config(str(config_file), (), TrainConfig).config
    arch = ModelConfig.parse(read_state(checkpoint)["arch"])
    name_map, model = hf_map(arch), build_model(arch, "meta")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = {name: tuple(value.shape) for name, value in tensors if name in name_map}
    values = read_model(checkpoint, list(shapes), max_bytes)
    tokenizer = cfg.data.tokenizer or cfg.model.path
    write_hf(shapes, values, name_map, out, config_to_hf(arch), getattr(torch, dtype), tokenizer)
