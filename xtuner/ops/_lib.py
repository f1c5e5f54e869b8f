"""The torch.library namespace `xtuner`, over the compiled core."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xtuner import _C

OpError = _C.Error

_C.init_exchange(torch.Tensor)
_library = torch.library.Library("xtuner", "DEF")
_KEYS = ("CPU", "CUDA", "PrivateUse1")
_implementations: dict[str, dict[torch._C.DispatchKey, Callable]] = {}


def define(schema: str, implementation: Callable, fake: Callable, cuda: Callable | None = None) -> None:
    """Register `xtuner::<name>` for every device the core can be built for; the core itself refuses a missing one."""
    _library.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    name = schema.split("(")[0]
    by_key = {key: cuda if key == "CUDA" and cuda else implementation for key in _KEYS}
    for key, function in by_key.items():
        _library.impl(name, function, key)
    torch.library.register_fake(f"xtuner::{name}", fake, lib=_library)
    _implementations[name] = {getattr(torch._C.DispatchKey, key): function for key, function in by_key.items()}


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """As torch.library.register_autograd, at two thirds of its cost: a call of an operator ends directly in its
    implementation when nothing but the device is left to dispatch on, where torch goes through the dispatcher again.
    """
    op = getattr(torch.ops.xtuner, name).default
    if op._schema.is_mutable:
        raise ValueError(f"xtuner::{name} writes to an argument, so it cannot be differentiated")
    defaults = tuple(argument.default_value for argument in op._schema.arguments)
    implementations, redispatch = _implementations[name], op.redispatch
    after_autograd = torch._C._after_ADInplaceOrView_keyset
    any_requires_grad = torch._C._any_requires_grad

    def compute(keys: torch._C.DispatchKeySet, args: Sequence):
        keys = keys & after_autograd
        implementation = implementations.get(keys.highestPriorityTypeId())
        if implementation is not None:
            return implementation(*args)
        with torch._C._AutoDispatchBelowAutograd():  # a mode or a kind of tensor that wants to see the call
            return redispatch(keys, *args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args_and_keys):
            *args, keys = args_and_keys
            output = compute(keys, args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            result = backward(ctx, *grads)
            return (*result, None) if isinstance(result, tuple) else (result, None)

    Function.__name__ = Function.__qualname__ = f"GeneratedBackwardFor_xtuner_{name}"

    def kernel(keys: torch._C.DispatchKeySet, *args):
        args += defaults[len(args) :]  # which the dispatcher leaves out
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return Function.apply(*args, keys)
        return compute(keys, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def not_differentiable(name: str, why: str) -> None:
    """For an op that has no gradient formula: differentiating it is an error, never a silent zero."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"xtuner::{name} cannot be differentiated: {why}")

    autograd(name, backward, lambda ctx, inputs, output: None)


def once_differentiable(name: str) -> None:
    """For a backward op."""
    not_differentiable(name, "double backward is not supported here")
