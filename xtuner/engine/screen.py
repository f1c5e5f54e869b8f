"""What the user sees while a run is going and when it ends."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# Seconds between plain lines where there is no terminal to redraw.
LINE_INTERVAL = 5.0


class Screen:
    """A live progress line on a terminal, a plain line every few seconds elsewhere, nothing when not `enabled`."""

    def __init__(self, steps: int, first_step: int, enabled: bool):
        self.console = Console(quiet=not enabled, highlight=False)
        self.steps, self.first_step, self.started = steps, first_step, time.monotonic()
        self.last_line = 0.0
        self.progress = None
        if enabled and sys.stdout.isatty():
            columns = [
                TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
            ]
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task("train", total=steps, completed=first_step, text="")

    def __enter__(self) -> Screen:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def step(self, step: int, loss: float, tokens_per_second: float, memory_gib: float) -> None:
        text = (
            f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {memory_gib:.1f} GiB  ETA {self._remaining(step)}"
        )
        if self.progress:
            self.progress.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_line >= LINE_INTERVAL or step == self.steps:
            self.last_line = time.monotonic()
            self.note(f"step {step}/{self.steps}  {text}")

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def summary(self, title: str, rows: dict[str, Any]) -> None:
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, str(value))
        self.console.print(table)

    def _remaining(self, step: int) -> str:
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) / max(1, done) * (self.steps - step)
        return format_seconds(seconds)


def format_seconds(seconds: float) -> str:
    """123.4 -> '2:03'; hours appear when there are any."""
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
