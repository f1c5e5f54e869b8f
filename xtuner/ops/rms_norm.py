"""Root-mean-square normalisation (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, in float32; x / rms is rounded before the weight.

    Args:
        x: float32 or bfloat16 [..., D].
        weight: [D] in the dtype of x.

    Returns:
        As x.
    """
    if x.dim() == 2:
        return torch.ops.xtuner.rms_norm(x, weight, eps)[0]
    return torch.ops.xtuner.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)[0].view(x.shape)


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu":
        return _in_torch(x, weight, eps)
    out, inverse_rms = _fake(x, weight, eps)
    _C.rms_norm(x.contiguous(), weight.contiguous(), eps, out, inverse_rms, torch.get_num_threads())
    return out, inverse_rms


def _fake_bwd(dout: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rms_norm_bwd(dout: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu":
        return _in_torch_bwd(dout, x, weight, inverse_rms)
    dx, dweight = _fake_bwd(dout, x, weight, inverse_rms)
    rows = _C.rms_norm_block_rows
    workspace = x.new_empty((x.shape[0] + rows - 1) // rows, x.shape[1], dtype=torch.float32)
    contiguous = (t.contiguous() for t in (dout, x, weight, inverse_rms))
    _C.rms_norm_bwd(*contiguous, dx, dweight, workspace, torch.get_num_threads())
    return dx, dweight


def _in_torch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Where the core has no kernel. vector_norm reads x once and, unlike square().mean(), writes no temporary."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    inverse_rms = norm.square().div(x.shape[-1]).add(eps).rsqrt()
    return (x * inverse_rms[:, None]).to(x.dtype) * weight, inverse_rms


def _in_torch_bwd(dout: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    unit = x * inverse_rms[:, None]  # float32
    product = dout * unit
    # Normalising loses the component of the gradient along x.
    along = (product @ weight.float()).unsqueeze(-1).div(x.shape[-1])
    dx = (dout * weight.float()).addcmul_(unit, along, value=-1).mul_(inverse_rms[:, None])
    return dx.to(x.dtype), product.sum(0).to(weight.dtype)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx, grad: Tensor, _grad_inverse_rms: None):
    return *torch.ops.xtuner.rms_norm_bwd(grad, *ctx.saved_tensors), None


define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _rms_norm, _fake)
define(
    "rms_norm_bwd(Tensor dout, Tensor x, Tensor weight, Tensor inverse_rms) -> (Tensor, Tensor)",
    _rms_norm_bwd,
    _fake_bwd,
)
autograd("rms_norm", _backward, _setup)
once_differentiable("rms_norm_bwd")
