"""Timing shared by the op benchmarks: ours and its rivals in one process, in turns, medians."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from emulate import SETTINGS, run_as

import xtuner


class Timing(NamedTuple):
    """Seconds per call: wall time, and the CPU time of all threads, which other load on the machine disturbs less."""

    wall: float
    cpu: float


def timed(call: Callable) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved_medians(calls: dict[str, Callable], budget_s: float) -> dict[str, Timing]:
    """Medians over rounds A B C A B C …, after one call of each; at least 3 rounds, at most 25.

    A rival that takes longer than the budget is called that once only.
    """
    ours, *_ = calls
    first = {name: timed(call) for name, call in calls.items()}
    again = [name for name in calls if name == ours or first[name].wall < budget_s]
    rounds = max(3, min(25, int(budget_s / max(sum(first[name].wall for name in again), 1e-6))))
    samples = {name: [] if name in again else [first[name]] for name in calls}
    for _ in range(rounds):
        for name in again:
            samples[name].append(timed(calls[name]))
    return {name: Timing(*map(statistics.median, zip(*times, strict=True))) for name, times in samples.items()}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


class Report:
    """Prints a line per case: ours, then how many times longer each rival takes by wall time (and by CPU time).

    Ends with geometric means; writes everything as JSON when asked to.
    """

    def __init__(self, title: str, unit: str, add_arguments: Callable = lambda parser: None):
        parser = argparse.ArgumentParser(description=title)
        parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
        parser.add_argument("--budget", type=float, default=0.7, help="seconds per case and rival set")
        parser.add_argument("--json", type=Path, help="add the results to this JSON file")
        parser.add_argument("--isa", choices=sorted(SETTINGS), help="as on a processor with no more than this")
        add_arguments(parser)
        self.args = parser.parse_args()
        self.emulated = run_as(self.args.isa)
        self.title = title if self.args.isa is None else f"{title}, as on {self.args.isa}"
        self.unit, self.rows, self.extra = unit, [], {}

    def case(self, group: str, shape: str, work: float, calls: dict[str, Callable]) -> None:
        """`calls` begins with ours; `work` is in units of 1e9 per call (GFLOP or GB), counted alike for all."""
        timings = interleaved_medians(calls, self.args.budget)
        ours, *rivals = timings.items()
        ratios = {name: t.wall / ours[1].wall for name, t in rivals}
        cpu_ratios = {name: t.cpu / ours[1].cpu for name, t in rivals}
        text = "  ".join(f"{ratios[name]:.2f}x ({cpu_ratios[name]:.2f}x) {name}" for name in ratios)
        threads, rate = torch.get_num_threads(), work / ours[1].wall
        measured = f"{ours[1].wall * 1e6:9.0f} us {rate:7.1f} {self.unit}"
        print(f"{group:27s} {shape:30s} t{threads} {measured}  {text}", flush=True)
        self.rows.append(
            {
                "group": group,
                "shape": shape,
                "threads": threads,
                "wall_us": {name: round(t.wall * 1e6, 1) for name, t in timings.items()},
                "cpu_us": {name: round(t.cpu * 1e6, 1) for name, t in timings.items()},
                "rate": round(rate, 2),
                "wall_speedup_over": {name: round(r, 3) for name, r in ratios.items()},
                "cpu_speedup_over": {name: round(r, 3) for name, r in cpu_ratios.items()},
            }
        )

    def finish(self) -> None:
        found: dict[str, dict[str, list[float]]] = {}
        for row in self.rows:
            for rival in row["wall_speedup_over"]:
                entry = found.setdefault(
                    f"{row['group']}, {row['threads']} threads, over {rival}", {"wall": [], "cpu": []}
                )
                entry["wall"].append(row["wall_speedup_over"][rival])
                entry["cpu"].append(row["cpu_speedup_over"][rival])
        summary = {name: {k: round(statistics.geometric_mean(r), 3) for k, r in e.items()} for name, e in found.items()}
        for name, mean in summary.items():
            print(f"geomean {mean['wall']:.2f}x ({mean['cpu']:.2f}x)  {name}")
        if self.args.json:
            everything = json.loads(self.args.json.read_text()) if self.args.json.exists() else {}
            entry = {"machine": self.machine(), "unit": self.unit, "geomean": summary, **self.extra, "cases": self.rows}
            everything[self.title] = entry
            self.args.json.write_text(json.dumps(everything, indent=1) + "\n")

    def machine(self) -> dict:
        info = xtuner.build_info()
        return {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_average_at_end": [round(x, 1) for x in os.getloadavg()],
            "isa": info["isa"],
            "emulated": self.emulated,
            "compiler": info["compiler"],
            "xtuner": info["version"],
            "torch": torch.__version__,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        }
