"""float8 with one float32 scale per 128 values or per 128 x 128 block: x ~ q * scale.

scale = max(largest |x| of the block, eps) / 448 (57344 for float8_e5m2), rounded up to a power of two if asked to;
q = x * (1 / scale), rounded to nearest even. A block with NaN or infinity has only NaN codes.
Granularity and layouts are those of DeepSeek-V3 (arXiv 2412.19437, section 3.3). None of these ops has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import define, not_differentiable

E4M3 = torch.float8_e4m3fn


def row_scale_ld(rows: int) -> int:
    """Columns of a row scale matrix: rows up to a multiple of 4."""
    return (rows + 3) // 4 * 4


def padded_rows(rows: int, num_experts: int) -> int:
    """Columns of `quantize_rowcol`'s qt: room for every expert's rows, padded to multiples of 128."""
    return (rows + 127 * num_experts) // 128 * 128


def quantize_1x128(
    x: Tensor,
    offsets: Tensor | None = None,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """One scale per row and 128 columns.

    Args:
        x: float32 or bfloat16 [R, H], H a multiple of 128.
        offsets: int64 [E+1]; rows from offsets[E] on are not read, their q and scales are zero. None: all rows count.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two: round scales up to powers of two; quantizing then changes no mantissa but by rounding.
        eps: floor of a block's largest value, in [1e-30, 1].

    Returns:
        q [R, H] and scale float32 [H/128, ld], ld = R up to a multiple of 4: x[r, c] ~ q[r, c] * scale[c // 128, r].
    """
    return torch.ops.xtuner.quantize_1x128(x, offsets, dtype, power_of_two, eps)


def quantize_128x128(
    w: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    """One scale per 128 x 128 block of weights [E, N, K] (N and K multiples of 128), from one read of them.

    Returns:
        q [E, N, K], its transpose qt [E, K, N], and scale float32 [E, N/128, K/128]; that of qt is its transpose.
    """
    return torch.ops.xtuner.quantize_128x128(w, dtype, power_of_two, eps)


def quantize_rowcol(
    x: Tensor, offsets: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both operands that training needs of x [R, H], from one read of it; arguments as `quantize_1x128`.

    Returns:
        q [R, H] and scale, as `quantize_1x128`;
        qt [H, P], P = `padded_rows(R, E)`: x transposed, each expert's columns zero-padded to a multiple of 128;
        scale_t float32 [P/128, H]: one scale per row of qt and 128 columns.
    """
    return torch.ops.xtuner.quantize_rowcol(x, offsets, dtype, power_of_two, eps)


def permute_quantize_rowcol(
    x: Tensor,
    maps: tuple[Tensor, Tensor],
    offsets: Tensor,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantize_rowcol(permute(x, *maps), offsets, ...) bit for bit, without the permuted copy.

    Args:
        x: float32 or bfloat16 [T, H], H a multiple of 128.
        maps: row_of int32 [T, K] and src int32 [R] from `route_map`.

    Raises:
        OpError: a src outside [-1, T*K); on a GPU it is noted for `raise_faults`.
    """
    row_of, src = maps
    return torch.ops.xtuner.permute_quantize_rowcol(x, src, row_of.shape[1], offsets, dtype, power_of_two, eps)


def swiglu_quantize_rowcol(
    x: Tensor,
    offsets: Tensor,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantize_rowcol(swiglu(x, offsets, ...), offsets, ...) bit for bit, without the copy between them.

    x: float32 or bfloat16 [R, 2H], gate, then up; H a multiple of 128. Other arguments as for the two ops.
    """
    args = (alpha, limit, up_offset, dtype, power_of_two, eps)
    return torch.ops.xtuner.swiglu_quantize_rowcol(x, offsets, *args)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale in float32, then as `dtype`: for q [R, H] with row scales or q [E, N, K] with block scales."""
    return torch.ops.xtuner.dequantize(q, scale, dtype)


def _fake_1x128(x: Tensor, offsets: Tensor | None, dtype: torch.dtype, power_of_two: bool, eps: float):
    scale = x.new_empty(x.shape[1] // 128, row_scale_ld(x.shape[0]), dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), scale


def _quantize_1x128(x: Tensor, offsets: Tensor | None, dtype: torch.dtype, power_of_two: bool, eps: float):
    q, scale = _fake_1x128(x, offsets, dtype, power_of_two, eps)
    _C.quantize_1x128(x, offsets, power_of_two, eps, q, scale, torch.get_num_threads())
    return q, scale


def _fake_128x128(w: Tensor, dtype: torch.dtype, power_of_two: bool, eps: float):
    experts, n, k = w.shape
    scale = w.new_empty(experts, n // 128, k // 128, dtype=torch.float32)
    return torch.empty_like(w, dtype=dtype), w.new_empty(experts, k, n, dtype=dtype), scale


def _quantize_128x128(w: Tensor, dtype: torch.dtype, power_of_two: bool, eps: float):
    q, qt, scale = _fake_128x128(w, dtype, power_of_two, eps)
    _C.quantize_128x128(w, power_of_two, eps, q, qt, scale, torch.get_num_threads())
    return q, qt, scale


def _rowcol_outputs(x: Tensor, rows: int, hidden: int, offsets: Tensor, dtype: torch.dtype):
    padded = padded_rows(rows, offsets.shape[0] - 1)
    scale = x.new_empty(hidden // 128, row_scale_ld(rows), dtype=torch.float32)
    turned = x.new_empty(hidden, padded, dtype=dtype), x.new_empty(padded // 128, hidden, dtype=torch.float32)
    return x.new_empty(rows, hidden, dtype=dtype), scale, *turned


def _fake_rowcol(x: Tensor, offsets: Tensor, dtype: torch.dtype, power_of_two: bool, eps: float):
    return _rowcol_outputs(x, *x.shape, offsets, dtype)


def _quantize_rowcol(x: Tensor, offsets: Tensor, dtype: torch.dtype, power_of_two: bool, eps: float):
    outputs = _fake_rowcol(x, offsets, dtype, power_of_two, eps)
    _C.quantize_rowcol(x, offsets, power_of_two, eps, *outputs, torch.get_num_threads())
    return outputs


def _fake_permute(x: Tensor, src: Tensor, num_experts_per_tok: int, offsets: Tensor, dtype, power_of_two, eps):
    return _rowcol_outputs(x, src.shape[0], x.shape[1], offsets, dtype)


def _permute(x: Tensor, src: Tensor, num_experts_per_tok: int, offsets: Tensor, dtype, power_of_two: bool, eps: float):
    outputs = _fake_permute(x, src, num_experts_per_tok, offsets, dtype, power_of_two, eps)
    rule = (power_of_two, eps)
    _C.permute_quantize_rowcol(x, src, num_experts_per_tok, offsets, *rule, *outputs, torch.get_num_threads())
    return outputs


def _fake_swiglu(x: Tensor, offsets: Tensor, alpha, limit, up_offset, dtype: torch.dtype, power_of_two, eps):
    return _rowcol_outputs(x, x.shape[0], x.shape[1] // 2, offsets, dtype)


def _swiglu(x: Tensor, offsets: Tensor, alpha, limit, up_offset, dtype: torch.dtype, power_of_two: bool, eps: float):
    outputs = _fake_swiglu(x, offsets, alpha, limit, up_offset, dtype, power_of_two, eps)
    scalars = (alpha, limit, up_offset, power_of_two, eps)
    _C.swiglu_quantize_rowcol(x, offsets, *scalars, *outputs, torch.get_num_threads())
    return outputs


def _fake_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(q, dtype=dtype)


def _dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = _fake_dequantize(q, scale, dtype)
    _C.dequantize(q, scale, out, torch.get_num_threads())
    return out


_RULE = "ScalarType dtype, bool power_of_two, float eps"
define(f"quantize_1x128(Tensor x, Tensor? offsets, {_RULE}) -> (Tensor, Tensor)", _quantize_1x128, _fake_1x128)
define(f"quantize_128x128(Tensor w, {_RULE}) -> (Tensor, Tensor, Tensor)", _quantize_128x128, _fake_128x128)
define(
    f"quantize_rowcol(Tensor x, Tensor offsets, {_RULE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize_rowcol,
    _fake_rowcol,
)
define(
    f"permute_quantize_rowcol(Tensor x, Tensor src, int num_experts_per_tok, Tensor offsets, {_RULE})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _permute,
    _fake_permute,
)
define(
    f"swiglu_quantize_rowcol(Tensor x, Tensor offsets, float alpha, float? limit, float up_offset, {_RULE})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _swiglu,
    _fake_swiglu,
)
define("dequantize(Tensor q, Tensor scale, ScalarType dtype) -> Tensor", _dequantize, _fake_dequantize)
for _name in (
    "quantize_1x128", "quantize_128x128", "quantize_rowcol", "permute_quantize_rowcol", "swiglu_quantize_rowcol",
    "dequantize",
):  # fmt: skip
    not_differentiable(_name, "float8 has no gradient; the layer that quantizes defines one")
