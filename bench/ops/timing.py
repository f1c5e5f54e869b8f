"""Timing shared by the op benchmarks: ours and its rivals in one process, in turns, medians of wall time."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import xtuner


def interleaved_medians(calls: dict[str, Callable], budget_s: float) -> dict[str, float]:
    """Seconds per call of each, as the median over rounds A B C A B C …; at least 3 rounds, at most 25."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    rounds = max(3, min(25, int(budget_s / max(time.perf_counter() - start, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


class Report:
    """Prints one line per case, then the geometric mean of each ratio; writes all of it as JSON when asked to."""

    def __init__(self, title: str, unit: str):
        parser = argparse.ArgumentParser(description=title)
        parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
        parser.add_argument("--budget", type=float, default=0.7, help="seconds per case and rival set")
        parser.add_argument("--json", type=Path, help="add the results to this JSON file")
        self.title, self.unit, self.rows = title, unit, []
        self.args = parser.parse_args()

    def case(self, group: str, shape: str, work: float, calls: dict[str, Callable]) -> None:
        """`calls` begins with ours; `work` is in units of 1e9 per call (GFLOP or GB), counted alike for all."""
        seconds = interleaved_medians(calls, self.args.budget)
        ours, *rivals = seconds
        ratios = {rival: seconds[rival] / seconds[ours] for rival in rivals}
        threads = torch.get_num_threads()
        text = "  ".join(f"{r:.2f}x {name}" for name, r in ratios.items())
        rate = work / seconds[ours]
        measured = f"{seconds[ours] * 1e6:9.0f} us {rate:7.1f} {self.unit}"
        print(f"{group:27s} {shape:32s} t{threads} {measured}  {text}", flush=True)
        self.rows.append(
            {
                "group": group,
                "shape": shape,
                "threads": threads,
                "us": {name: round(s * 1e6, 1) for name, s in seconds.items()},
                "rate": round(rate, 2),
                "speedup_over": {name: round(r, 3) for name, r in ratios.items()},
            }
        )

    def finish(self) -> None:
        means: dict[str, list[float]] = {}
        for row in self.rows:
            for rival, ratio in row["speedup_over"].items():
                means.setdefault(f"{row['group']}, {row['threads']} threads, over {rival}", []).append(ratio)
        summary = {name: round(math.exp(statistics.fmean(map(math.log, r))), 3) for name, r in means.items()}
        for name, mean in summary.items():
            print(f"geomean {mean:.2f}x  {name}")
        if self.args.json:
            everything = json.loads(self.args.json.read_text()) if self.args.json.exists() else {}
            entry = {"machine": self.machine(), "unit": self.unit, "geomean": summary, "cases": self.rows}
            everything[self.title] = entry
            self.args.json.write_text(json.dumps(everything, indent=1) + "\n")

    def machine(self) -> dict:
        info = xtuner.build_info()
        return {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_average_at_end": [round(x, 1) for x in os.getloadavg()],
            "isa": info["isa"],
            "compiler": info["compiler"],
            "xtuner": info["version"],
            "torch": torch.__version__,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        }
