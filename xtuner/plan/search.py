"""Layouts that fit, best first, from the model with few of its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from xtuner.config import MemoryConfig, ModelConfig, TrainConfig
from xtuner.errors import ConfigError
from xtuner.parallel import check_layout
from xtuner.plan.device import OVERHEAD, Device
from xtuner.plan.simulate import Simulation, simulate

GIB = 2**30
TECHNIQUES = (
    {"checkpointing": "none"},
    {"checkpointing": "selective"},
    {"checkpointing": "full"},
    {"checkpointing": "full", "offload_activations": True},
)


@dataclass(frozen=True)
class Candidate:
    ep_size: int
    memory: dict
    peak: float
    seconds: float

    def row(self, tokens: int) -> str:
        technique = self.memory["checkpointing"] + (" + offload" if self.memory.get("offload_activations") else "")
        speed = f"{tokens / self.seconds:9,.0f} tokens/device/s"
        return f"{self.ep_size:3d}  {technique:16} {self.peak / GIB:7.1f} GiB {speed}"


def search(cfg: TrainConfig, arch: ModelConfig, gpus: int, device: Device, document: int, imbalance: float) -> int:
    """Print the layouts; returns 0 if any fits."""
    found = []
    for ep_size in _ep_sizes(cfg, arch, gpus):
        for memory in TECHNIQUES:
            all_memory = {**cfg.memory.model_dump(), "offload_activations": False, **memory}
            fields = {
                "parallel": cfg.parallel.model_copy(update={"ep_size": ep_size}),
                "memory": MemoryConfig.parse(all_memory),
            }
            peak, seconds = _estimate(cfg.model_copy(update=fields), arch, gpus, device, document, imbalance)
            found.append(Candidate(ep_size, memory, peak, seconds))
    tokens = cfg.data.pack_max_length * cfg.micro_batch_size // cfg.parallel.sp_size
    fitting = sorted((c for c in found if c.peak <= device.memory_gib * GIB), key=lambda c: c.seconds)
    print(f"{len(fitting)} of {len(found)} layouts fit {gpus} x {device.name} (ep_size, checkpointing, peak, speed):")
    for candidate in fitting:
        print("  " + candidate.row(tokens))
    print("Peaks are extrapolated from few blocks: plan the one you choose without --search.")
    return 0 if fitting else 1


def _ep_sizes(cfg: TrainConfig, arch: ModelConfig, gpus: int) -> list[int]:
    sizes = []
    for ep_size in (1, 2, 4, 8, 16, 32, 64):
        try:
            check_layout(cfg.parallel.model_copy(update={"ep_size": ep_size}), arch, gpus)
        except ConfigError:
            continue
        sizes.append(ep_size)
    return sizes


def _estimate(
    cfg: TrainConfig, arch: ModelConfig, gpus: int, device: Device, document: int, imbalance: float
) -> tuple[float, float]:
    """Peak in bytes and seconds of a step: straight lines through two small depths.

    A peak is not one line but the highest of several: the forward pass, backward at its first blocks (when most is
    kept) and at its last (when most gradients are there), and the update. Each is continued by itself.
    """
    dense = len([i for i in arch.dense_layers if i < arch.num_hidden_layers]) if arch.moe is not None else 0
    depths = [min(dense + extra, arch.num_hidden_layers) for extra in (3, 5)]
    runs = [simulate(cfg, arch.model_copy(update={"num_hidden_layers": n}), gpus, device, document, imbalance)
            for n in depths]  # fmt: skip
    if depths[0] == depths[1]:
        return _with_overhead(runs[0].tracker.peak.device), runs[0].clock.step_seconds()

    def at_depth(first: float, second: float) -> float:
        return first + (second - first) * (arch.num_hidden_layers - depths[0]) / (depths[1] - depths[0])

    peaks = [at_depth(a, b) for a, b in zip(_events(runs[0]), _events(runs[1]), strict=True)]
    return _with_overhead(max(peaks)), at_depth(*(run.clock.step_seconds() for run in runs))


def _events(run: Simulation) -> list[int]:
    backward = [size for phase, size in run.tracker.timeline if phase == "backward"]
    backward = backward[len(backward) // 2 :]  # of the second step
    third = len(backward) // 3
    peaks = run.tracker.phase_peaks
    return [peaks["forward"], max(backward[:third]), max(backward[-third:]), peaks["update"]]


def _with_overhead(peak: float) -> float:
    return peak * (1 + OVERHEAD["fragmentation"]) + OVERHEAD["outside_gib"] * GIB
