"""What would save how much memory, when a run does not fit."""

from __future__ import annotations

from xtuner.config import ModelConfig, TrainConfig


def advice(cfg: TrainConfig, arch: ModelConfig, by_kind: dict[str, int]) -> list[tuple[str, int]]:
    """Settings that are not on yet and the bytes each saves at the peak by its arithmetic, most first.

    Args:
        by_kind: bytes at the peak.
    """
    memory, layers = cfg.memory, arch.num_hidden_layers
    width = 2 if cfg.parallel.compute_dtype == "bfloat16" else 4
    tokens = cfg.data.pack_max_length * cfg.micro_batch_size // cfg.parallel.sp_size
    inputs = tokens * arch.hidden_size * width  # of one block
    found = []
    if memory.checkpointing != "full" or memory.checkpointing_ratio < 1:
        # What one block needs stays, for it is made again; inputs of all stay, too.
        found.append(("memory.checkpointing=full", by_kind["activations"] * (layers - 1) // layers - layers * inputs))
    if memory.checkpointing != "none" and not memory.offload_activations:
        found.append(("memory.offload_activations=true", (layers - 2) * inputs))
    if not memory.offload_optimizer and not memory.offload_parameters:
        found.append(("memory.offload_optimizer=true", by_kind["optimizer"]))
    if not memory.offload_parameters:
        state = sum(by_kind[kind] for kind in ("parameters", "gradients", "optimizer"))
        found.append(("memory.offload_parameters=true", state))
    if memory.reduce_dtype == "float32":
        found.append(("memory.reduce_dtype=bfloat16", by_kind["communication"] // 3))
    if cfg.parallel.compute_dtype == "float32":
        found.append(("parallel.compute_dtype=bfloat16", (by_kind["activations"] + by_kind["communication"]) // 2))
    if arch.moe is not None and cfg.parallel.ep_size == 1:
        found.append(("parallel.ep_size=8 (or more)", by_kind["communication"] * 3 // 4))
    per_token = by_kind["activations"] // 2
    found.append((f"data.pack_max_length={cfg.data.pack_max_length // 2}", per_token))
    return sorted(((name, size) for name, size in found if size > 0), key=lambda item: -item[1])
