"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """weight * x / rms(x) over the last dim (Zhang & Sennrich 2019); statistics in float32, result in x's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number per row; autograd through the formula keeps three copies of x and takes twice the time."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # vector_norm reads x once and, unlike square().mean(), writes no temporary.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_rms = norm.square().div(x.shape[-1]).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse_rms)
        # Cast before the weight is applied, as transformers does, so that bfloat16 rounds alike.
        return (x * inverse_rms).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, inverse_rms = ctx.saved_tensors
        unit = x * inverse_rms  # float32
        product = grad * unit
        dweight = product.flatten(0, -2).sum(0).to(weight.dtype)
        weight = weight.float()
        # Normalising loses the component of the gradient along x.
        along = (product @ weight).unsqueeze(-1).div(x.shape[-1])
        dx = (grad * weight).addcmul_(unit, along, value=-1).mul_(inverse_rms)
        return dx.to(x.dtype), dweight, None
