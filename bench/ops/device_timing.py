"""Timing on a GPU (or, to try a benchmark out, on the CPU): medians, each call with cold second-level caches."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

import xtuner

FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU


class Clock:
    def __init__(self, device: torch.device, budget_s: float):
        self.device, self.budget_s = device, budget_s
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def _once(self, call: Callable) -> float:
        if self.device.type == "cpu":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        self._flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def medians(self, calls: dict[str, Callable]) -> dict[str, float]:
        """Seconds per call, over rounds A B C A B C …; at least 3 rounds, at most 50."""
        for call in calls.values():
            call()  # compiles, allocates
        start = time.perf_counter()
        samples = {name: [self._once(call)] for name, call in calls.items()}
        rounds = max(2, min(49, int(self.budget_s / max(time.perf_counter() - start, 1e-6))))
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(self._once(call))
        return {name: statistics.median(times) for name, times in samples.items()}


def _nvidia_smi(fields: str) -> dict[str, str]:
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return dict(zip(fields.split(","), values.split(", "), strict=True))


def machine(device: torch.device) -> dict:
    """What the figures were measured on. Call it right after measuring: clocks are those under load."""
    info = xtuner.build_info()
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "xtuner": info["version"],
        "compiler": info["compiler"],
    }
    if device.type == "cuda":
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["nvidia_smi"] = _nvidia_smi(
            "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        )
    return found
