"""What would save how much memory: the run's own step on tensors without data, with one setting changed at a time."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner.config import ModelConfig, TrainConfig, with_overrides
from xtuner.errors import ConfigError
from xtuner.parallel import check_layout
from xtuner.plan.device import Device
from xtuner.plan.extrapolate import estimate


def advice(
    cfg: TrainConfig,
    arch: ModelConfig,
    num_ranks: int,
    device: Device,
    document: int,
    imbalance: float = 1.0,
    on_host: bool = False,
) -> list[tuple[str, int]]:
    """Settings that are not on yet and the bytes each takes off the peak of one rank, most first.

    Args:
        document, imbalance: as in `simulate`.
        on_host: the ranks compute where the host's memory is, so that nothing is saved by keeping something there.

    Returns:
        Overrides as they are typed after a CONFIG, several with spaces between. Peaks are continued from few blocks.
    """
    before = estimate(cfg, arch, num_ranks, device, document, imbalance).peak
    found = []
    for overrides in _changes(cfg, arch, num_ranks, on_host):
        try:
            changed = with_overrides(cfg, overrides)
            check_layout(changed.parallel, arch, num_ranks)
            tokens = min(document, changed.data.pack_max_length)
            after = estimate(changed, arch, num_ranks, device, tokens, imbalance).peak
        except ConfigError:
            continue  # this run cannot have it
        found.append((" ".join(overrides), before - after))
    return sorted(((name, size) for name, size in found if size > 0), key=lambda item: -item[1])


def _changes(cfg: TrainConfig, arch: ModelConfig, num_ranks: int, on_host: bool) -> Iterator[list[str]]:
    memory, parallel = cfg.memory, cfg.parallel
    full = memory.checkpointing == "full" and memory.checkpointing_ratio == 1
    if memory.checkpointing == "none":
        yield ["memory.checkpointing=selective"]
    if not full:
        yield ["memory.checkpointing=full", "memory.checkpointing_ratio=1"][: 1 + (memory.checkpointing_ratio < 1)]
    if not on_host:
        if memory.checkpointing != "none" and not memory.offload_activations:
            yield ["memory.offload_activations=true"]
        if not memory.offload_optimizer and not memory.offload_parameters:
            yield ["memory.offload_optimizer=true"]
        if not memory.offload_parameters:
            yield ["memory.offload_parameters=true", "memory.offload_optimizer=false"][: 1 + memory.offload_optimizer]
    if parallel.compute_dtype == "float32":
        yield ["parallel.compute_dtype=bfloat16"]
    if num_ranks > 1:
        if memory.reduce_dtype == "float32":
            yield ["memory.reduce_dtype=bfloat16"]
        if not parallel.reshard_after_forward:
            yield ["parallel.reshard_after_forward=true"]
        if arch.moe is not None:
            yield [f"parallel.ep_size={2 * parallel.ep_size}"]
        yield [f"parallel.sp_size={2 * parallel.sp_size}"]
    if cfg.micro_batch_size > 1 and cfg.micro_batch_size % 2 == 0:
        yield [f"micro_batch_size={cfg.micro_batch_size // 2}"]
    if cfg.data.pack_max_length > 1:
        yield [f"data.pack_max_length={cfg.data.pack_max_length // 2}"]
