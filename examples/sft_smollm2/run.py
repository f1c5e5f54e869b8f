"""The whole example: weights, tasks, score before, fine-tuning, score after, one table.

    python examples/sft_smollm2/run.py [key.sub=value …]        (overrides of config.py)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from evaluate import Score, evaluate
from make_tasks import make_tasks
from prepare import prepare
from rich.console import Console
from rich.table import Table

HERE = Path("runs/sft_smollm2")
CONFIG = Path(__file__).with_name("config.py")


def main(overrides: list[str]) -> None:
    started = time.monotonic()
    HERE.mkdir(parents=True, exist_ok=True)
    model = prepare(HERE / "model")
    _, held_out = make_tasks(HERE / "tasks")
    before, before_seconds = _timed(evaluate, model, held_out)
    print(f"before: {before['all'].exact_percent:.1f} % exact ({before_seconds:.0f} s)", flush=True)

    shutil.rmtree(HERE / "train", ignore_errors=True)
    command = [sys.executable, "-m", "xtuner.run", "train", str(CONFIG), *overrides]
    _, train_seconds = _timed(subprocess.run, command, check=True)
    after, after_seconds = _timed(evaluate, HERE / "train/hf", held_out)

    _print_table(before, after)
    total = time.monotonic() - started
    rise = after["all"].exact_percent - before["all"].exact_percent
    result = {
        "rise_points": round(rise, 1),
        "before": {name: vars(score) for name, score in before.items()},
        "after": {name: vars(score) for name, score in after.items()},
        "seconds": {
            "before": round(before_seconds), "training": round(train_seconds), "after": round(after_seconds),
            "total": round(total),
        },
    }  # fmt: skip
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"exact match on held-out tasks rose by {rise:.1f} points; {total / 60:.1f} minutes in total")


def _print_table(before: dict[str, Score], after: dict[str, Score]) -> None:
    table = Table(title="Held-out tasks, % (exact | reply contains the answer)")
    for column in ("task", "problems", "before", "after"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, old in before.items():
        cells = [f"{score.exact_percent:.0f} | {score.contained_percent:.0f}" for score in (old, after[name])]
        table.add_row(name, str(old.count), *cells, end_section=name != "all" and name == sorted(before)[-1])
    Console().print(table)


def _timed(function, *args, **kwargs):
    start = time.monotonic()
    return function(*args, **kwargs), time.monotonic() - start


if __name__ == "__main__":
    main(sys.argv[1:])
