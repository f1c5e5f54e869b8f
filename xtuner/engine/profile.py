"""torch's profiler over a few steps of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from xtuner.config import LogConfig
from xtuner.parallel import World


class ProfileWindow:
    """While entered, records the steps that `cfg` asks for; every rank leaves `<run_dir>/profile/rank-<r>.json`.

    The file is a Chrome trace (chrome://tracing, https://ui.perfetto.dev).
    """

    def __init__(self, cfg: LogConfig, run_dir: Path, world: World):
        self.steps = range(cfg.profile_from, cfg.profile_from + cfg.profile_steps) if cfg.profile_from else range(0)
        self.file = run_dir / "profile" / f"rank-{world.rank}.json"
        self.activities = [torch.profiler.ProfilerActivity.CPU]
        if world.device.type == "cuda":
            self.activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def before_step(self, step: int) -> None:
        """`step` counts from 1."""
        if step in self.steps and self._profiler is None:
            self._profiler = torch.profiler.profile(activities=self.activities, record_shapes=True)
            self._profiler.start()
        elif step not in self.steps:
            self._finish()

    def _finish(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.file))
            self._profiler = None
