"""Losses of the tiny MoE, recorded per kind of processor. Run this to add or renew the entry of this machine.

    python -m tests.golden.make_golden

A change that should not alter numbers must leave the file alone; one that should says so in its commit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

import xtuner
from tests.engine.tiny import launch, losses, make_tokenizer, tiny_config, write_config

FILE = Path(__file__).parent / "tiny_moe.json"
DATA = Path(__file__).parent / "tiny_moe.jsonl"


def machine_key() -> str:
    """What decides the rounding: our instruction set, torch's, torch's version, and the maker (MKL asks for it)."""
    vendor = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("vendor_id")), "?")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{xtuner.build_info()['isa']} {capability} {vendor} torch-{torch.__version__.split('+')[0]}"


def run(directory: Path) -> list[float]:
    """20 steps on the committed text, one rank, one thread."""
    make_tokenizer(directory / "tokenizer")
    data = {"train": [str(DATA)], "validation": [], "tokenizer": str(directory / "tokenizer")}
    config = tiny_config(directory, data=data)
    result = launch(write_config(directory / "golden.json", config), cwd=directory)
    assert result.returncode == 0, result.stderr
    return losses(directory / "run")


if __name__ == "__main__":
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        known[machine_key()] = run(Path(directory))
    FILE.write_text(json.dumps(known, indent=1) + "\n")
    sys.stdout.write(f"recorded {machine_key()}\n")
