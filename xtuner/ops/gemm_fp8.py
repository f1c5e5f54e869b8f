"""Grouped products of float8 operands with one scale per 128 values along k: forward, data and weight gradients.

sum over blocks of 128 k, in order, of (sum of a * b over the block) * (scale_a * scale_b), all sums in float32: the
recipe of DeepSeek-V3 (arXiv 2412.19437, section 3.3). Operands come from `quantize_1x128`, `quantize_128x128` and
`quantize_rowcol`. Neither product has a gradient of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import define, not_differentiable


def gemm_m_grouped_fp8(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Rows offsets[e]:offsets[e+1] of the result are those of `a` times b[e] transposed; unused rows are zero.

    Args:
        a: float8 [R, K] with row scales scale_a float32 [K/128, ld]; rows from offsets[E] on are never read.
        b: float8 [E, N, K] with block scales scale_b float32 [E, N/128, K/128], of any strides.
            The data gradient takes `quantize_128x128`'s qt with scale.transpose(1, 2).
        offsets: int64 [E+1].
        out_dtype: float32 or bfloat16.

    Returns:
        [R, N].
    """
    return torch.ops.xtuner.gemm_m_grouped_fp8(a, scale_a, b, scale_b, offsets, out_dtype)


def gemm_k_grouped_fp8(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """out[e] = a_e b_e^T over the tokens of expert e: the weight gradient.

    Args:
        a, b: float8 [M, P] and [N, P] with scales float32 [P/128, M] and [P/128, N], from `quantize_rowcol`.
        offsets: int64 [E+1], of the rows before padding.
        out_dtype: float32 or bfloat16.

    Returns:
        [E, M, N]; zero for an expert without rows.
    """
    return torch.ops.xtuner.gemm_k_grouped_fp8(a, scale_a, b, scale_b, offsets, out_dtype)


def gemm_k_grouped_fp8_(
    out: Tensor, a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, offsets: Tensor, beta: float = 1.0
) -> Tensor:
    """out[e] = beta * out[e] + a_e b_e^T in place, beta 0 or 1: accumulation straight into a gradient buffer."""
    torch.ops.xtuner.gemm_k_grouped_fp8_(out, a, scale_a, b, scale_b, offsets, beta)
    return out


def _fake_m(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


def _gemm_m(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    out = _fake_m(a, scale_a, b, scale_b, offsets, out_dtype)
    _C.gemm_m_grouped_fp8(a, scale_a, b, scale_b, offsets, out, torch.get_num_threads())
    return out


def _fake_k(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, a.shape[0], b.shape[0], dtype=out_dtype)


def _gemm_k(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    out = _fake_k(a, scale_a, b, scale_b, offsets, out_dtype)
    _accumulate(out, a, scale_a, b, scale_b, offsets, 0.0)
    return out


def _accumulate(
    out: Tensor, a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, offsets: Tensor, beta: float
) -> None:
    _C.gemm_k_grouped_fp8(a, scale_a, b, scale_b, offsets, beta, out, torch.get_num_threads())


_OPERANDS = "Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor offsets"
define(f"gemm_m_grouped_fp8({_OPERANDS}, ScalarType out_dtype) -> Tensor", _gemm_m, _fake_m)
define(f"gemm_k_grouped_fp8({_OPERANDS}, ScalarType out_dtype) -> Tensor", _gemm_k, _fake_k)
define(f"gemm_k_grouped_fp8_(Tensor(a!) out, {_OPERANDS}, float beta) -> ()", _accumulate, lambda *_: None)
for _name in ("gemm_m_grouped_fp8", "gemm_k_grouped_fp8"):
    not_differentiable(_name, "its gradients need operands quantized along other dims, which the layer has")
