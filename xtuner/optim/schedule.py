"""Learning rate as a pure function of the step, so that resuming needs no scheduler state but the step itself."""

from __future__ import annotations

import math

from xtuner.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, cfg: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) in a run of `steps`.

    Warm-up rises linearly and reaches `peak` at step `warmup_steps`; the rest falls to `peak * min_lr_ratio`, which
    linear, cosine and wsd (warm-up, stable, linear decay over the last `decay_steps`) reach at the last step.
    """
    if step < cfg.warmup_steps:
        return peak * (step + 1) / (cfg.warmup_steps + 1)
    return peak * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * _decay(step, steps, cfg))


def _decay(step: int, steps: int, cfg: ScheduleConfig) -> float:
    """Part of the way from the floor to the peak, in [0, 1]."""
    if cfg.kind == "constant":
        return 1.0
    start = steps - 1 - cfg.decay_steps if cfg.kind == "wsd" else cfg.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    return 0.5 * (1 + math.cos(math.pi * progress)) if cfg.kind == "cosine" else 1.0 - progress
