"""The torch.library namespace `xtuner`, over the compiled core."""

from __future__ import annotations

from collections.abc import Callable

import torch

from xtuner import _C

OpError = _C.Error

_C.init_exchange(torch.Tensor)
_library = torch.library.Library("xtuner", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register `xtuner::<name>` for every device the core can be built for; the core itself refuses a missing one."""
    _library.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    name = schema.split("(")[0]
    for key in ("CPU", "CUDA", "PrivateUse1"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"xtuner::{name}", fake, lib=_library)


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(f"xtuner::{name}", backward, setup_context=setup_context, lib=_library)


def not_differentiable(name: str, why: str) -> None:
    """For an op that has no gradient formula: differentiating it is an error, never a silent zero."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"xtuner::{name} cannot be differentiated: {why}")

    autograd(name, backward, lambda ctx, inputs, output: None)


def once_differentiable(name: str) -> None:
    """For a backward op."""
    not_differentiable(name, "double backward is not supported here")
