"""The product of a layer in float8, with both gradients: DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3).

Tokens and gradients are quantized per row and 128 columns (for the weight gradient per column and 128 rows), weights
per 128 x 128 block, all to float8_e4m3fn; sums are float32. Results and gradients have the dtype of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner.ops._lib import OpError
from xtuner.ops.gemm_fp8 import gemm_k_grouped_fp8, gemm_m_grouped_fp8
from xtuner.ops.quantize import (
    permute_quantize_rowcol,
    quantize_128x128,
    quantize_rowcol,
    swiglu_quantize_rowcol,
)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    maps: tuple[Tensor, Tensor] | None = None,
    gated: bool = False,
) -> Tensor:
    """Rows offsets[e]:offsets[e+1] of the result are those of `x` times the transpose of matrix e of `weight`.

    Args:
        x: float32 or bfloat16 [R, K]; rows from offsets[E] on are never read.
        weight: [E*N, K], E matrices below each other, N and K multiples of 128; or a `Float8Weight` of this shape.
        offsets: int64 [E+1]; None: one matrix for all rows.
        maps: row_of [T, K] and src [R] from `route_map`: then x is [T, K] and its tokens are gathered into rows as they
            are quantized.
        gated: x is [R, 2K], and swiglu(x) is what is multiplied; it is computed as it is quantized.

    Returns:
        [R, N]; unused rows are zero.

    Raises:
        OpError: shapes that do not fit together.
    """
    columns = "2K" if gated else "K"
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] * (2 if gated else 1):
        raise OpError(f"linear_fp8: x {list(x.shape)} must be [R, {columns}] for weight {list(weight.shape)}")
    if gated and maps is not None:
        raise OpError("linear_fp8: maps and gated exclude each other")
    if maps is not None and offsets is None:
        raise OpError("linear_fp8: maps need the offsets of their rows")
    if offsets is None:
        offsets = torch.tensor([0, x.shape[0]], device=x.device)
    if weight.shape[0] % (128 * (offsets.shape[0] - 1)) or weight.shape[1] % 128:
        raise OpError(
            f"linear_fp8: weight {list(weight.shape)} must be {offsets.shape[0] - 1} matrices with multiples of 128 "
            "rows and columns"
        )
    return _LinearFp8.apply(x, weight, offsets, *(maps or (None, None)), gated)


class Float8Weight(Tensor):
    """A weight [N, K] that exists only as codes float8_e4m3fn [N, K] and block scales float32 [N/128, K/128].

    To autograd it is a tensor of `dtype`, which is that of its gradient. Only `linear_fp8` can compute with it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        same_shape = {
            aten.detach.default: lambda: True,
            aten.alias.default: lambda: True,
            aten.view.default: lambda: list(args[1]) == list(args[0].shape),
            aten.as_strided.default: lambda: (
                list(args[1]) == list(args[0].shape) and list(args[2]) == list(args[0].stride())
            ),
        }
        if function in same_shape and same_shape[function]():
            return cls(args[0].codes, args[0].scale, args[0].dtype)
        raise NotImplementedError(f"{function}: a weight in float8 takes part in linear_fp8 only")


class _LinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, offsets: Tensor, row_of, src, gated: bool) -> Tensor:
        codes, _, scale = _quantized(weight, offsets)
        if gated:
            q, scale_q, qt, scale_qt = swiglu_quantize_rowcol(x, offsets)
        elif row_of is not None:
            q, scale_q, qt, scale_qt = permute_quantize_rowcol(x, (row_of, src), offsets)
        else:
            q, scale_q, qt, scale_qt = quantize_rowcol(x, offsets)
        # The weight itself, not its codes: a sharded one is freed until backward, and its codes should be too.
        ctx.save_for_backward(weight, offsets, qt, scale_qt, row_of, src, x if gated else None)
        return gemm_m_grouped_fp8(q, scale_q, codes, scale, offsets, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, offsets, qt, scale_qt, row_of, src, gates = ctx.saved_tensors
        g, scale_g, gt, scale_gt = quantize_rowcol(grad.contiguous(), offsets)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            _, turned, scale = _quantized(weight, offsets)
            dx = gemm_m_grouped_fp8(g, scale_g, turned.contiguous(), scale.transpose(1, 2), offsets, grad.dtype)
            if gates is not None:
                dx = torch.ops.xtuner.swiglu_bwd(dx, gates, offsets, 1.0, None, 0.0)
            elif row_of is not None:
                dx = torch.ops.xtuner.unpermute(dx, row_of, src, None)
        if ctx.needs_input_grad[1]:
            dw = gemm_k_grouped_fp8(gt, scale_gt, qt, scale_qt, offsets, grad.dtype).flatten(0, 1)
        return dx, dw, None, None, None, None


def _quantized(weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the stacked matrices codes [E, N, K], their transposes [E, K, N] of any strides, scales [E, N/128, K/128]."""
    num_matrices = offsets.shape[0] - 1
    if isinstance(weight, Float8Weight):
        codes, scale = (t.unflatten(0, (num_matrices, -1)) for t in (weight.codes, weight.scale))
        return codes, codes.transpose(1, 2), scale
    return quantize_128x128(weight.unflatten(0, (num_matrices, -1)))
