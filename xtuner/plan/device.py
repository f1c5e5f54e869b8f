"""Machines a plan can be made for: the contents of devices.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from xtuner.errors import ConfigError

GIB = 2**30
_DATA = tomllib.loads((Path(__file__).parent / "devices.toml").read_text())
_APART = ("efficiency", "overhead")
EFFICIENCY: dict[str, float] = _DATA["efficiency"]
OVERHEAD: dict[str, float] = _DATA["overhead"]


@dataclass(frozen=True)
class Device:
    """Units as in devices.toml."""

    name: str
    memory_gib: float
    bf16: float
    hbm: float
    link: float
    network: float
    host: float
    per_node: int
    fp8: float | None = None


DEVICES = {name: Device(name, **fields) for name, fields in _DATA.items() if name not in _APART}


def get_device(name: str) -> Device:
    if name not in DEVICES:
        raise ConfigError(f"--device={name}: there are {', '.join(DEVICES)}")
    return DEVICES[name]
