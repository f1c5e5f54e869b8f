"""RMSNorm of each query or key head, then rotary: the two of a Qwen3 layer in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, once_differentiable
from xtuner.ops.rms_norm import _in_torch as _norm_in_torch
from xtuner.ops.rms_norm import _in_torch_bwd as _norm_in_torch_bwd
from xtuner.ops.rotary import _in_torch as _rotary_in_torch


def rms_norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`rotary(rms_norm(x, weight, eps), cos, sin)`, with its bits.

    Args:
        x: float32 or bfloat16 [T, H, D].
        weight: [D] in the dtype of x.
        cos, sin: [T, D/2] in the dtype of x. Not differentiable.

    Returns:
        As x.
    """
    return torch.ops.xtuner.rms_norm_rotary(x, weight, cos, sin, eps)[0]


def _fake(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


def _rms_norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu":
        return _in_torch(x, weight, cos, sin, eps)
    out, inverse_rms = _fake(x, weight, cos, sin, eps)
    contiguous = (t.contiguous() for t in (x, weight, cos, sin))
    _C.rms_norm_rotary(*contiguous, eps, out, inverse_rms, torch.get_num_threads())
    return out, inverse_rms


def _fake_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rms_norm_rotary_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu":
        return _in_torch_bwd(dout, x, weight, cos, sin, inverse_rms)
    dx, dweight = _fake_bwd(dout, x, weight, cos, sin, inverse_rms)
    rows, block = x.shape[0] * x.shape[1], _C.rms_norm_block_rows
    workspace = x.new_empty((rows + block - 1) // block, x.shape[2], dtype=torch.float32)
    contiguous = (t.contiguous() for t in (dout, x, weight, cos, sin, inverse_rms))
    _C.rms_norm_rotary_bwd(*contiguous, dx, dweight, workspace, torch.get_num_threads())
    return dx, dweight


def _in_torch(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Where the core has no kernel."""
    out, inverse_rms = _norm_in_torch(x.flatten(0, 1), weight, eps)
    return _rotary_in_torch(out.view(x.shape), cos, sin, False), inverse_rms.view(x.shape[:2])


def _in_torch_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    turned = _rotary_in_torch(dout, cos, sin, True)
    dx, dweight = _norm_in_torch_bwd(turned.flatten(0, 1), x.flatten(0, 1), weight, inverse_rms.flatten())
    return dx.view(x.shape), dweight


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], output[1])


def _backward(ctx, grad: Tensor, _grad_inverse_rms: None):
    dx, dweight = torch.ops.xtuner.rms_norm_rotary_bwd(grad, *ctx.saved_tensors)
    return dx, dweight, None, None, None


_TABLES = "Tensor cos, Tensor sin"
define(
    f"rms_norm_rotary(Tensor x, Tensor weight, {_TABLES}, float eps) -> (Tensor, Tensor)", _rms_norm_rotary, _fake
)
define(
    f"rms_norm_rotary_bwd(Tensor dout, Tensor x, Tensor weight, {_TABLES}, Tensor inverse_rms) -> (Tensor, Tensor)",
    _rms_norm_rotary_bwd,
    _fake_bwd,
)
autograd("rms_norm_rotary", _backward, _setup)
once_differentiable("rms_norm_rotary_bwd")
