"""Memory and time of a deep model from itself with few of its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from xtuner.config import ModelConfig, TrainConfig
from xtuner.plan.device import GIB, OVERHEAD, Device
from xtuner.plan.roofline import step_seconds
from xtuner.plan.simulate import Simulation, simulate

_PHASES = ("forward", "backward", "update", "between")


@dataclass(frozen=True)
class Estimate:
    """Device bytes at the peak, with what the allocator and the context take, and seconds of a step."""

    peak: int
    seconds: float

    def fits(self, device: Device) -> bool:
        return self.peak <= device.memory_gib * GIB


def estimate(
    cfg: TrainConfig, arch: ModelConfig, gpus: int, device: Device, document: int, imbalance: float
) -> Estimate:
    """What a plan at full depth would say, from two depths that differ by one block.

    Between two of FSDP2's gathers and reductions, memory and time grow by the same for every block that is added before
    or after; a step's peak is the highest of many such straight lines, so each is continued by itself.
    """
    dense = len([i for i in arch.dense_layers if i < arch.num_hidden_layers]) if arch.moe is not None else 0
    # So deep that blocks stand between those that have no neighbour of their kind to prefetch.
    depth, layers = dense + 5, arch.num_hidden_layers
    partly = cfg.memory.checkpointing != "none" and cfg.memory.checkpointing_ratio not in (0, 1)
    if partly or layers <= depth + 1:  # blocks are not alike, or few anyway
        run = simulate(cfg, arch, gpus, device, document, imbalance)
        return Estimate(_with_overhead(run.tracker.peak.device), run.clock.step_seconds())
    few, more = (
        simulate(cfg, arch.model_copy(update={"num_hidden_layers": n}), gpus, device, document, imbalance)
        for n in (depth, depth + 1)
    )
    steps = layers - depth
    peak = max(a + (b - a) * steps for phase in _PHASES for a, b in _matched(few, more, phase))
    seconds = {key: s + (more.clock.seconds[key] - s) * steps for key, s in few.clock.seconds.items()}
    return Estimate(_with_overhead(peak), step_seconds(seconds))


def _matched(few: Simulation, more: Simulation, phase: str) -> list[tuple[int, int]]:
    """Peaks of a phase's windows at two depths: the first half counted from its start, the others from its end."""
    a, b = ([peak for name, peak in run.tracker.windows if name == phase] for run in (few, more))
    half = len(a) // 2
    return [*zip(a[:half], b[:half], strict=True), *zip(a[half:], b[len(b) - len(a) + half :], strict=True)]


def _with_overhead(peak: int) -> int:
    return int(peak * (1 + OVERHEAD["fragmentation"]) + OVERHEAD["outside_gib"] * GIB)
