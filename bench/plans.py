"""Plans of the biggest models on the machines they are meant for, and the longest documents that fit.

    python bench/plans.py [--json bench/results/plans.json]

The published points that the first two stand beside: Qwen3-235B-A22B on 256 H800 in bfloat16, 2,000 tokens/GPU/s with
sharding alone and 65,536 tokens a step, 1,540 by Megatron-LM at 4,096 tokens with pipelines.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from xtuner.config import TrainConfig, load_config
from xtuner.engine.trainer import resolve_model
from xtuner.plan.device import get_device
from xtuner.plan.plan import GIB, make_plan
from xtuner.plan.simulate import simulate

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# example, device, devices, tokens per device, document, imbalance
POINTS = [
    ("pretrain_qwen3_235b", "h800-80g", 256, 65536, 65536, 1.0),
    ("pretrain_qwen3_235b", "h800-80g", 256, 65536, 4096, 1.0),
    ("pretrain_qwen3_235b", "ascend-a3-64g", 256, 32768, 4096, 1.0),
    ("pretrain_deepseek_v3", "h800-80g", 512, 8192, 8192, 1.5),
    ("pretrain_kimi_k2", "h800-80g", 1024, 8192, 8192, 1.5),
]
LONGER = ("pretrain_deepseek_v3", "pretrain_kimi_k2")  # of these, also twice as long as long as it fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for example, device, devices, tokens, document, imbalance in POINTS:
        while True:
            row = plan_point(example, device, devices, tokens, document, imbalance)
            rows.append(row)
            print(f"{example:22} {devices:5} x {device:14} {tokens:7,} tokens, documents of {document:7,}: "
                  f"{row['peak_gib']:6.2f} GiB {'fits' if row['fits'] else 'too much':8} "
                  f"{row['tokens_per_second']:7,.0f} tokens/device/s, MFU {row['mfu']:.3f} "
                  f"(planned in {row['planned_in']:.0f} s)", flush=True)  # fmt: skip
            if example not in LONGER or not row["fits"]:
                break
            tokens, document = 2 * tokens, 2 * document
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def plan_point(example: str, device_name: str, devices: int, tokens: int, document: int, imbalance: float) -> dict:
    overrides = [f"data.pack_max_length={tokens}"]
    cfg, device = load_config(str(EXAMPLES / f"{example}.toml"), overrides, TrainConfig).config, get_device(device_name)
    arch, _ = resolve_model(cfg)
    started = time.perf_counter()
    plan = make_plan(arch, cfg, simulate(cfg, arch, devices, device, document, imbalance), device, document)
    return {
        "example": example, "device": device_name, "devices": devices, "tokens": tokens, "document": document,
        "imbalance": imbalance, "fits": plan.fits, "peak_gib": round(plan.peak / GIB, 2),
        "by_kind_gib": {kind: round(size / GIB, 2) for kind, size in plan.by_kind.items()},
        "host_gib": round(plan.host / GIB, 2), "step_seconds": round(plan.step_seconds, 2),
        "tokens_per_second": round(plan.tokens_per_second, 1), "mfu": round(plan.mfu, 4),
        "planned_in": round(time.perf_counter() - started, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
