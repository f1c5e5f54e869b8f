"""Figures of a run: one JSON object per line, TensorBoard events, throughput and memory."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch

# Dense bf16 peak in FLOP/s, without sparsity, from the vendors' data sheets (SXM variants).
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}


def device_peak_flops(device: torch.device) -> float | None:
    """bf16 peak of `device` in FLOP/s, None where it is not known (CPUs among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far, in GiB: resident memory on CPU, allocated memory on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsWriter:
    """Appends records to `<run_dir>/metrics.jsonl` and, if asked, to TensorBoard.

    A resumed run first drops the records of steps that it is about to repeat, so the file reads as if never stopped.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, first_step: int):
        self.path = run_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= first_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
        partial.rename(self.path)
        self._file = open(self.path, "a", buffering=1)
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Record `values` (None entries are left out) of finished step `step`, counted from 1."""
        values = {k: v for k, v in values.items() if v is not None}
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
