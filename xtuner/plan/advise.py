"""`python -m xtuner.run advise`: what would have saved how much memory of a run that had not enough."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xtuner.config import TrainConfig
from xtuner.engine.trainer import resolve_model
from xtuner.errors import ConfigError
from xtuner.plan.advice import advice
from xtuner.plan.device import GIB, get_device

# Of the device only the ranks of a node and the allocator's overhead matter to memory.
DEVICE = "h100-80g"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read what a run left when it was out of memory (run_dir/out_of_memory/rank-N.json), run its own step on "
        "tensors without data, with one setting changed at a time, and list what each saves at the peak of one rank."
    )
    parser.add_argument("snapshot", type=Path, metavar="SNAPSHOT")


def main(args: argparse.Namespace) -> int:
    snapshot = _read(args.snapshot)
    cfg = TrainConfig.parse(snapshot["config"])
    arch, _ = resolve_model(cfg)
    console = Console(highlight=False, soft_wrap=True)
    held = Table("held on this rank", "GiB", title=f"out of memory in {snapshot['phase']}", title_justify="left")
    for kind, size in snapshot["bytes"].items():
        held.add_row(kind, f"{size / GIB:.3f}")
    console.print(held)
    saves = Table("setting", "saves GiB", title="what would save how much", title_justify="left")
    on_host = snapshot["device"] == "cpu"
    tokens = cfg.data.pack_max_length
    for setting, size in advice(cfg, arch, snapshot["num_ranks"], get_device(DEVICE), tokens, on_host=on_host):
        saves.add_row(setting, f"{size / GIB:.3f}")
    console.print(saves)
    console.print("add one or more to the command, with --resume auto to go on from the newest checkpoint")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: not a readable snapshot of a run out of memory ({e})") from None
