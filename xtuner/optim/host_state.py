"""Optimizer state on the host: between steps, and during them for all parameters but one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from xtuner import ops


def keep_state_on_host(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let `optimizer.step()` update one parameter after another, each with its state brought to it and back, in place.

    For any optimizer whose update of one parameter does not depend on the others. The result is the same, bit for bit.
    """
    optimizer.step = partial(_step_one_by_one, optimizer, optimizer.step)
    return optimizer


def _step_one_by_one(optimizer: torch.optim.Optimizer, step: Callable[[], None], closure: None = None) -> None:
    groups = optimizer.param_groups
    try:
        for group in groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = optimizer.state[param]
                _move(state, lambda x, param=param: ops.to_device(x, _local(param).device))
                optimizer.param_groups = [{**group, "params": [param]}]
                step()
                _move(state, ops.to_host)
    finally:
        optimizer.param_groups = groups


def _move(state: dict[str, Tensor], copy: Callable[[Tensor], Tensor]) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim:  # the step count stays where the optimizer wants it
            moved = copy(_local(value))
            state[name] = DTensor(moved, value._spec, requires_grad=False) if isinstance(value, DTensor) else moved


def _local(value: Tensor) -> Tensor:
    return value._local_tensor if isinstance(value, DTensor) else value
