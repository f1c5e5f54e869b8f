"""Copies between a device and its host, as operators, so that a memory tracker sees which is which on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner.ops._lib import define, not_differentiable


def to_host(x: Tensor) -> Tensor:
    """A copy of x in host memory, pinned where x is on a GPU; the copy runs on the current stream."""
    return torch.ops.xtuner.to_host(x)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of what `to_host` made; the copy runs on the current stream."""
    return torch.ops.xtuner.to_device(x, device)


def _to_host(x: Tensor) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.device.type == "cuda")
    return host.copy_(x, non_blocking=True)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x, non_blocking=True)


define("to_host(Tensor x) -> Tensor", _to_host, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"))
define(
    "to_device(Tensor x, Device device) -> Tensor",
    _to_device,
    lambda x, device: torch.empty(x.shape, dtype=x.dtype, device=device),
)
for _name in ("to_host", "to_device"):
    not_differentiable(_name, "it moves what backward keeps")
