"""Plans of the biggest models on the machines they are meant for, the longest documents that fit, and a search.

    python bench/plans.py [--json bench/results/plans.json]

Published points stand beside ours where there are any, all of Qwen3-235B-A22B: 256 H800 with sharding alone and 65,536
tokens a step, 2,000 tokens/GPU/s in bfloat16 and 2,450 in float8 (XTuner V1; the same page has 1,540 for Megatron-LM at
4,096 tokens with pipelines); Ascend A3, 2,086 tokens/s per chip of two dies, of which one is a device here (per die its
utilisation of 0.37 would be above 0.7). No point was fitted: one set of efficiencies, that of devices.toml, serves all.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from xtuner.config import ModelConfig, TrainConfig, load_config
from xtuner.engine.trainer import resolve_model
from xtuner.plan.device import GIB, get_device
from xtuner.plan.plan import make_plan
from xtuner.plan.search import find_layouts, longest
from xtuner.plan.simulate import simulate

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@dataclass(frozen=True)
class Point:
    """published: tokens per device and second."""

    example: str
    devices: int
    tokens: int
    document: int
    imbalance: float = 1.0
    device: str = "h800-80g"
    overrides: tuple[str, ...] = ()
    published: float | None = None

    def read(self) -> tuple[TrainConfig, ModelConfig]:
        overrides = [f"data.pack_max_length={self.tokens}", *self.overrides]
        cfg = load_config(str(EXAMPLES / f"{self.example}.toml"), overrides, TrainConfig).config
        return cfg, resolve_model(cfg)[0]


QWEN, DEEPSEEK, KIMI = "pretrain_qwen3_235b", "pretrain_deepseek_v3", "pretrain_kimi_k2"
POINTS = [
    Point(QWEN, 256, 65536, 65536),
    Point(QWEN, 256, 65536, 4096, published=2000),
    Point(QWEN, 256, 65536, 4096, overrides=("fp8.enabled=true",), published=2450),
    Point(QWEN, 256, 65536, 4096, overrides=("optim.kind=muon",)),
    Point(QWEN, 512, 32768, 4096, device="ascend-a3-64g", published=2086 / 2),
    Point(DEEPSEEK, 512, 8192, 8192, 1.5),
    Point(KIMI, 1024, 8192, 8192, 1.5),
]
LONGEST = [Point(QWEN, 256, 65536, 65536), Point(DEEPSEEK, 512, 8192, 8192, 1.5), Point(KIMI, 1024, 8192, 8192, 1.5)]
SEARCHED = Point(QWEN, 256, 65536, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {
        "machine": {"torch": torch.__version__, "python": platform.python_version(), "arch": platform.machine()},
        "points": [plan_point(point) for point in POINTS],
        "longest": [plan_longest(point) for point in LONGEST],
        "search": search(SEARCHED),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def plan_point(point: Point) -> dict:
    started = time.perf_counter()
    cfg, arch = point.read()
    return _row(point, cfg, arch, point.document, started)


def plan_longest(point: Point) -> dict:
    """As one document."""
    started = time.perf_counter()
    cfg, arch = point.read()
    cfg, document = longest(cfg, arch, point.devices, get_device(point.device), None, point.imbalance)
    return {"longest": True, **_row(point, cfg, arch, document, started)}


def _row(point: Point, cfg: TrainConfig, arch: ModelConfig, document: int, started: float) -> dict:
    device, tokens = get_device(point.device), cfg.data.pack_max_length
    plan = make_plan(arch, cfg, simulate(cfg, arch, point.devices, device, document, point.imbalance), device, document)
    row = {
        "example": point.example, "overrides": list(point.overrides), "device": point.device, "devices": point.devices,
        "tokens": tokens, "document": document, "imbalance": point.imbalance, "fits": plan.fits,
        "peak_gib": round(plan.peak / GIB, 2),
        "by_kind_gib": {kind: round(size / GIB, 2) for kind, size in plan.by_kind.items()},
        "host_gib": round(plan.host / GIB, 2), "step_seconds": round(plan.step_seconds, 2),
        "tokens_per_second": round(plan.tokens_per_second, 1), "mfu": round(plan.mfu, 4),
        "planned_in": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    beside = ""
    if point.published is not None:
        ratio = plan.tokens_per_second / point.published
        row |= {"published": point.published, "over_published": round(ratio, 3)}
        beside = f", published {point.published:,.0f}: {100 * (ratio - 1):+.0f} %"
    name = " ".join([point.example, *point.overrides])
    print(f"{name:36} {point.devices:5} x {point.device:13} {tokens:7,} tokens, documents of {document:7,}: "
          f"{row['peak_gib']:6.2f} GiB {'fits' if plan.fits else 'too much':8} {plan.tokens_per_second:7,.0f} "
          f"tokens/device/s, MFU {plan.mfu:.3f}{beside} ({row['planned_in']:.0f} s)", flush=True)  # fmt: skip
    return row


def search(point: Point) -> dict:
    started = time.perf_counter()
    cfg, arch = point.read()
    found = find_layouts(cfg, arch, point.devices, get_device(point.device), point.document, point.imbalance)
    took = time.perf_counter() - started
    print(f"{len(found.fitting)} layouts of {point.example} fit {point.devices} x {point.device} "
          f"({found.tried} simulated in {took:.0f} s):")  # fmt: skip
    for candidate in found.fitting:
        print("  " + candidate.row(), flush=True)
    rows = [
        {
            "ep_size": c.cfg.parallel.ep_size, "sp_size": c.cfg.parallel.sp_size,
            "checkpointing": c.cfg.memory.checkpointing, "offload_activations": c.cfg.memory.offload_activations,
            "peak_gib": round(c.estimate.peak / GIB, 2), "tokens_per_second": round(c.tokens_per_second, 1),
        }
        for c in found.fitting
    ]  # fmt: skip
    return {"example": point.example, "device": point.device, "devices": point.devices, "tokens": point.tokens,
            "document": point.document, "tried": found.tried, "took": round(took, 1), "fitting": rows}  # fmt: skip


if __name__ == "__main__":
    main()
