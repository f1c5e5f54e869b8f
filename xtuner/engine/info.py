"""What this installation can do on this machine."""

from __future__ import annotations

import os
import platform

import torch
from rich.console import Console
from rich.table import Table

import xtuner


def print_info() -> None:
    """Print versions, compiled backends, instruction sets and devices."""
    build = xtuner.build_info()
    rows = {
        "xtuner": xtuner.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": build["compiler"],
        "backends": ", ".join(f"{name} {'yes' if on else 'no'}" for name, on in build["backends"].items()),
        "instruction set": f"{build['isa']} (built: {', '.join(build['isas'])})",
        "cores": str(len(os.sched_getaffinity(0))),
        "cuda devices": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)
