"""`python -m xtuner.run plan`: whether a run fits a machine, and how fast it would be."""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from xtuner.config import ModelConfig, TrainConfig, load_config
from xtuner.engine.trainer import resolve_model
from xtuner.errors import ConfigError
from xtuner.models import flops_per_token
from xtuner.plan.advice import advice
from xtuner.plan.device import GIB, OVERHEAD, Device, get_device
from xtuner.plan.roofline import BESIDE
from xtuner.plan.simulate import Simulation, simulate
from xtuner.plan.timeline import plot_timeline
from xtuner.plan.tracker import KINDS


@dataclass(frozen=True)
class Plan:
    """What is expected of one rank. Sizes in bytes, times in seconds.

    by_kind    at the moment of the peak, device kinds only; with `slack` (allocator) and `outside` (context, NCCL)
    host       peak of what is kept on the host
    tokens     per rank and step
    """

    by_kind: dict[str, int]
    host: int
    step_seconds: float
    tokens: int
    mfu: float
    device: Device

    @property
    def peak(self) -> int:
        return sum(self.by_kind.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.memory_gib * GIB

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


def make_plan(arch: ModelConfig, cfg: TrainConfig, simulation: Simulation, device: Device, document: int) -> Plan:
    by_kind = {kind: simulation.tracker.peak.by_kind[kind] for kind in KINDS if kind != "host"}
    by_kind["slack"] = int(OVERHEAD["fragmentation"] * sum(by_kind.values()))
    by_kind["outside"] = int(OVERHEAD["outside_gib"] * GIB)
    # Ranks that share a sequence share its tokens.
    tokens = cfg.data.pack_max_length * cfg.micro_batch_size // cfg.parallel.sp_size
    seconds = simulation.clock.step_seconds()
    flops = flops_per_token(arch, document) * tokens / seconds
    return Plan(by_kind, simulation.tracker.host_peak, seconds, tokens, flops / (device.bf16 * 1e12), device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run two steps of the real engine on tensors without data, as rank 0 of many, and report memory, traffic and "
        "time. One micro-batch a step; assumptions and efficiencies are in xtuner/plan/devices.toml."
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--gpus", type=int, required=True, help="devices of the run")
    parser.add_argument("--device", default="h100-80g", help="a name in xtuner/plan/devices.toml")
    parser.add_argument("--document", type=int, help="tokens of each document; default: the micro-batch is one")
    parser.add_argument("--imbalance", type=float, default=1.0, help="rows of this rank's experts over the mean")
    parser.add_argument("--search", action="store_true", help="try layouts, and list those that fit, best first")
    parser.add_argument("--longest", action="store_true", help="find the largest data.pack_max_length that fits")
    parser.add_argument("--png", type=Path, help="where to draw memory over the step")


def main(args: argparse.Namespace) -> int:
    """Prints the report; the exit code is 1 when the run does not fit."""
    cfg = load_config(args.config, args.overrides, TrainConfig).config
    device = get_device(args.device)
    if args.gpus < 1 or args.imbalance < 1.0:
        raise ConfigError(f"--gpus={args.gpus} and --imbalance={args.imbalance} must be at least 1")
    arch, _ = resolve_model(cfg)
    document = min(args.document or cfg.data.pack_max_length * cfg.micro_batch_size, cfg.data.pack_max_length)
    started = time.perf_counter()
    if args.search:
        from xtuner.plan.search import print_search

        return print_search(cfg, arch, args.gpus, device, document, args.imbalance)
    if args.longest:
        from xtuner.plan.search import longest

        cfg, document = longest(cfg, arch, args.gpus, device, args.document, args.imbalance)
    simulation = simulate(cfg, arch, args.gpus, device, document, args.imbalance)
    plan = make_plan(arch, cfg, simulation, device, document)
    _print(plan, simulation, cfg, arch, args, document, time.perf_counter() - started)
    if args.png:
        plot_timeline(simulation.tracker, device.memory_gib, args.png)
        print(f"memory over the step: {args.png}")
    return 0 if plan.fits else 1


def _print(
    plan: Plan, sim: Simulation, cfg: TrainConfig, arch: ModelConfig, args: Namespace, document: int, took: float
) -> None:
    name = cfg.model.name or cfg.model.path or "the model"
    print(f"{name} on {args.gpus} x {plan.device.name}: {plan.tokens:,} tokens per device and step, "
          f"documents of {document:,}, imbalance {args.imbalance}")  # fmt: skip
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    print(f"\nmemory  {plan.peak / GIB:.2f} of {plan.device.memory_gib} GiB at the peak (in {sim.tracker.peak_phase}): "
          f"{verdict}; {plan.host / GIB:.2f} GiB on the host")  # fmt: skip
    for kind, size in plan.by_kind.items():
        print(f"  {kind:14} {size / GIB:8.2f} GiB")
    if not plan.fits:
        print_advice(cfg, arch, args.gpus, plan.device, document, args.imbalance)
    print("\ntraffic of one device in a step, sent")
    for (collective, link), size in sorted(sim.clock.traffic.items()):
        if size >= 1e6:
            print(f"  {collective:22} {link:8} {size / 1e9:9.2f} GB")
    seconds: dict[str, float] = defaultdict(float)
    for (_, what), value in sim.clock.seconds.items():
        seconds[what] += value
    speed = f"{plan.tokens_per_second:,.0f} tokens/device/s, MFU {plan.mfu:.3f}"
    print(f"\ntime    {plan.step_seconds:.2f} s a step, {speed}")
    for what, value in sorted(seconds.items(), key=lambda item: -item[1]):
        note = " (beside the others)" if what in BESIDE else ""
        print(f"  {what:18} {value:7.2f} s{note}")
    print(f"\nplanned in {took:.0f} s")


def print_advice(
    cfg: TrainConfig, arch: ModelConfig, gpus: int, device: Device, document: int, imbalance: float
) -> None:
    print("\nwhat would save how much at the peak")
    for setting, size in advice(cfg, arch, gpus, device, document, imbalance):
        print(f"  {setting:34} {size / GIB:8.2f} GiB")
