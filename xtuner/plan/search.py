"""Layouts that fit, best first, and the most tokens that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xtuner.config import MemoryConfig, ModelConfig, ParallelConfig, TrainConfig
from xtuner.errors import ConfigError
from xtuner.models import build_model
from xtuner.parallel import check_layout
from xtuner.plan.device import GIB, Device
from xtuner.plan.extrapolate import Estimate, estimate
from xtuner.plan.plan import Plan, make_plan, print_advice
from xtuner.plan.simulate import simulate

# Each keeps less than the next, and takes no less time.
LEANEST_FIRST = (
    {"checkpointing": "full", "offload_activations": True},
    {"checkpointing": "full", "offload_activations": False},
    {"checkpointing": "selective", "offload_activations": False},
    {"checkpointing": "none", "offload_activations": False},
)
EP_SIZES = (1, 2, 4, 8, 16, 32, 64)
SP_SIZES = (2, 4, 8)
TOKEN_STEP = 1024  # in which the longest is searched


@dataclass(frozen=True)
class Candidate:
    cfg: TrainConfig
    estimate: Estimate

    @property
    def tokens_per_second(self) -> float:
        return self.cfg.data.pack_max_length * self.cfg.micro_batch_size / self.cfg.parallel.sp_size / (
            self.estimate.seconds
        )  # fmt: skip

    def row(self) -> str:
        memory, parallel = self.cfg.memory, self.cfg.parallel
        technique = memory.checkpointing + (" + offload" if memory.offload_activations else "")
        return (
            f"ep {parallel.ep_size:2d}  sp {parallel.sp_size}  {technique:14} {self.estimate.peak / GIB:7.1f} GiB "
            f"{self.tokens_per_second:9,.0f} tokens/device/s"
        )


@dataclass(frozen=True)
class Found:
    """fitting: best first; tried: how many were simulated; leanest: of all that were tried."""

    fitting: list[Candidate]
    tried: int
    leanest: Candidate


def find_layouts(
    cfg: TrainConfig, arch: ModelConfig, gpus: int, device: Device, document: int, imbalance: float
) -> Found:
    """Every degree of expert parallelism with every way to recompute; sequences are split only if nothing fits whole.

    Raises:
        ConfigError: no layout is possible at all.
    """
    tried: list[Candidate] = []
    fitting: list[Candidate] = []
    refused: ConfigError | None = None
    for sp_sizes in ((cfg.parallel.sp_size,), SP_SIZES):
        for parallel in _layouts(cfg, arch, gpus, sp_sizes):
            for technique in LEANEST_FIRST:
                memory = MemoryConfig.parse(cfg.memory.model_dump() | {"checkpointing_ratio": 1.0} | technique)
                trial = cfg.model_copy(update={"parallel": parallel, "memory": memory})
                try:
                    expected = estimate(trial, arch, gpus, device, document, imbalance)
                except ConfigError as error:  # float8 cannot be cut like this
                    refused = error
                    break
                tried.append(Candidate(trial, expected))
                if not expected.fits(device):
                    break  # and so do not those that keep more
                fitting.append(tried[-1])
        if fitting:
            break
    if not tried:
        raise refused or ConfigError(f"--gpus={gpus}: no layout divides the model among them")
    fitting.sort(key=lambda c: (-c.tokens_per_second, c.estimate.peak))
    return Found(fitting, len(tried), min(tried, key=lambda c: c.estimate.peak))


def print_search(
    cfg: TrainConfig, arch: ModelConfig, gpus: int, device: Device, document: int, imbalance: float
) -> int:
    """Print the layouts that fit, best first, or what would help; returns 0 if any fits."""
    state = state_bytes(cfg, arch, gpus)
    if state > device.memory_gib * GIB:
        print(f"weights, gradients and optimizer state alone are {state / GIB:.1f} GiB on each of {gpus} "
              f"x {device.name} with {device.memory_gib} GiB, in any layout")  # fmt: skip
        print_advice(cfg, arch, gpus, device, document, imbalance)
        return 1
    found = find_layouts(cfg, arch, gpus, device, document, imbalance)
    if not found.fitting:
        print(f"none of {found.tried} layouts fits {gpus} x {device.name}; the leanest: {found.leanest.row()}")
        print_advice(found.leanest.cfg, arch, gpus, device, document, imbalance)
        return 1
    print(f"{len(found.fitting)} layouts fit {gpus} x {device.name}, best first (from two small depths, continued):")
    for candidate in found.fitting:
        print("  " + candidate.row())
    for candidate in found.fitting:
        best = _full_depth(candidate.cfg, arch, gpus, device, document, imbalance)
        verdict = "fits" if best.fits else "does not fit"
        print(f"at full depth {verdict}: {candidate.row()[:22].rstrip()}…: {best.peak / GIB:.1f} GiB, "
              f"{best.tokens_per_second:,.0f} tokens/device/s, MFU {best.mfu:.3f}")  # fmt: skip
        if best.fits:
            return 0
    return 1


def state_bytes(cfg: TrainConfig, arch: ModelConfig, gpus: int) -> int:
    """What a rank keeps of weights, gradients and optimizer state on the device, whatever else is chosen."""
    count = sum(p.numel() for p in build_model(arch, "meta").parameters()) // (cfg.parallel.shard_size or gpus)
    if cfg.memory.offload_parameters:
        return 0
    moments = 1 if cfg.optim.kind == "muon" else 2
    return 4 * count * (2 if cfg.memory.offload_optimizer else 2 + moments)


def longest(
    cfg: TrainConfig, arch: ModelConfig, gpus: int, device: Device, document: int | None, imbalance: float
) -> tuple[TrainConfig, int]:
    """`cfg` with the largest `data.pack_max_length` that fits, and the tokens of its documents; checked at full depth.

    Args:
        document: tokens of each document; None: the micro-batch is one.

    Raises:
        ConfigError: not even TOKEN_STEP tokens fit.
    """

    def with_tokens(steps: int) -> tuple[TrainConfig, int]:
        data = cfg.data.model_copy(update={"pack_max_length": steps * TOKEN_STEP})
        tokens = steps * TOKEN_STEP * cfg.micro_batch_size
        return cfg.model_copy(update={"data": data}), min(document or tokens, steps * TOKEN_STEP)

    def fits(steps: int) -> bool:
        trial, length = with_tokens(steps)
        return estimate(trial, arch, gpus, device, length, imbalance).fits(device)

    low, high = 0, max(1, cfg.data.pack_max_length // TOKEN_STEP)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    for steps in range(low, 0, -1):
        trial, length = with_tokens(steps)
        if _full_depth(trial, arch, gpus, device, length, imbalance).fits:
            return trial, length
    raise ConfigError(f"--longest: not even data.pack_max_length={TOKEN_STEP} fits {gpus} x {device.name}")


def _layouts(cfg: TrainConfig, arch: ModelConfig, gpus: int, sp_sizes: tuple[int, ...]) -> Iterator[ParallelConfig]:
    for sp_size in sp_sizes:
        for ep_size in EP_SIZES:
            parallel = cfg.parallel.model_copy(update={"ep_size": ep_size, "sp_size": sp_size})
            try:
                check_layout(parallel, arch, gpus)
            except ConfigError:
                continue
            yield parallel


def _full_depth(
    cfg: TrainConfig, arch: ModelConfig, gpus: int, device: Device, document: int, imbalance: float
) -> Plan:
    return make_plan(arch, cfg, simulate(cfg, arch, gpus, device, document, imbalance), device, document)
