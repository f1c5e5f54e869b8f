"""Every op that has a CUDA kernel: random inputs, the call, and what it must give; for GPUs, and for the CPU first."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from xtuner import ops
from xtuner.ops import reference

Tensors = tuple[torch.Tensor, ...]
op = torch.ops.xtuner

COLLECTIVE = {"ep_combine", "ep_combine_bwd", "ep_dispatch", "ep_prepare"}  # need a group of GPUs
CUDA_H = Path(__file__).parents[2] / "csrc/cuda/cuda.h"
KERNELS = set(re.findall(r"^void (\w+)\(", CUDA_H.read_text(), re.MULTILINE))


class Shape(NamedTuple):
    tokens: int
    k: int
    experts: int
    hidden: int

    @property
    def blocks(self) -> int:
        """hidden, up to a multiple of 128, as float8 needs it."""
        return -(-self.hidden // 128) * 128


SHAPES = [Shape(37, 2, 5, 24), Shape(64, 4, 7, 128), Shape(0, 2, 3, 128), Shape(130, 1, 2, 129), Shape(300, 8, 40, 768)]


class Case(NamedTuple):
    op: str
    inputs: Callable[[Shape, torch.dtype, torch.Generator], Tensors]  # on the CPU; NaN wherever nothing may be read
    call: Callable[..., Tensors]
    expected: Callable[..., Tensors]  # the same, in plain torch; floating-point inputs come as float64, NaN as 0
    exact: bool = False  # the bits, not only the values; floating-point inputs come as they are
    precision: float = 2e-5  # of float32 results
    rough: float | None = None  # relative, where that is what rounding to float8 leaves

    @property
    def has_kernel(self) -> bool:
        return self.op.removesuffix("_swiglu") in KERNELS  # a product with an activation is an option of the product


def routing(s: Shape, rng: torch.Generator) -> torch.Tensor:
    idx = (torch.rand(s.tokens, s.k, generator=rng) ** 2 * s.experts).int()  # skewed to low experts
    return idx.masked_fill(torch.rand(s.tokens, s.k, generator=rng) < 0.1, -1)


def maps(s: Shape, rng: torch.Generator) -> Tensors:
    """counts, offsets, row_of, src"""
    return reference.route_map(routing(s, rng), s.experts, s.tokens * s.k + 3)


def poisoned(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x[int(offsets[-1]) :] = float("nan")
    return x


def randn(rng: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng).to(dtype)


def wild(rng: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Blocks of 128 of very different sizes, some zero, and a few values that are no numbers."""
    blocks = torch.randn(*shape, generator=rng).unflatten(-1, (-1, 128))
    scale = torch.exp2(torch.randint(-40, 40, (*blocks.shape[:-1], 1), generator=rng).float())
    x = (blocks * torch.where(torch.rand(scale.shape, generator=rng) < 0.1, 0, scale)).flatten(-2)
    for value in (float("nan"), float("inf")):
        x.view(-1)[torch.randint(max(1, x.numel()), (min(x.numel(), 2),), generator=rng)] = value
    return x.to(dtype)


def rows(width: Callable[[Shape], int]) -> Callable:
    """x [R, width(shape)] with NaN behind the last row in use, and offsets."""

    def inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
        _, offsets, _, src = maps(s, rng)
        return poisoned(randn(rng, dtype, src.shape[0], width(s)), offsets), offsets

    return inputs


def unpermute_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    _, offsets, row_of, src = maps(s, rng)
    y = poisoned(randn(rng, dtype, src.shape[0], s.hidden), offsets)
    return y, row_of, src, torch.rand(s.tokens, s.k, generator=rng)


def with_gradient(inputs: Callable, shape_of: Callable[[Shape, Tensors], tuple[int, int]]) -> Callable:
    def both(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
        found = inputs(s, dtype, rng)
        return randn(rng, dtype, *shape_of(s, found)), *found

    return both


def gradients(function: Callable) -> Callable:
    """Of `function` by its floating-point arguments; the first argument is the gradient of its output."""

    def run(dout: torch.Tensor, *arguments) -> Tensors:
        leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
        function(*leaves).backward(dout)
        return tuple(a.grad for a in leaves if a.is_floating_point())

    return run


def swiglu_bwd_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    dout, x, offsets = with_gradient(rows(lambda s: 2 * s.hidden), lambda s, found: (found[0].shape[0], s.hidden))(
        s, dtype, rng
    )
    return poisoned(dout, offsets), x, offsets


def m_grouped_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    x, offsets = rows(lambda s: s.hidden)(s, dtype, rng)
    return x, randn(rng, dtype, s.experts, 256, s.hidden) / s.hidden**0.5, offsets


def dswiglu_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    x, offsets = rows(lambda s: 2 * s.hidden)(s, dtype, rng)
    dy = poisoned(randn(rng, dtype, x.shape[0], 136), offsets)
    b = randn(rng, dtype, s.experts, 136, s.hidden) / 136**0.5
    return dy, b, offsets, x, poisoned(torch.rand(x.shape[0], generator=rng), offsets)


def dswiglu(module) -> Callable[..., Tensors]:
    """Without weights, and with them; dweights as if they were a mean, as errors of the product add up in a sum."""

    def run(dy, b, offsets, x, weights) -> Tensors:
        dx, act, _ = module.gemm_m_grouped_dswiglu(dy, b, offsets, x, None, *SWIGLU)
        weighted_dx, weighted_act, dweights = module.gemm_m_grouped_dswiglu(dy, b, offsets, x, weights)
        return dx, act, weighted_dx, weighted_act, dweights / b.shape[2]

    return run


def k_grouped_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    x, offsets = rows(lambda s: s.hidden)(s, dtype, rng)
    return poisoned(randn(rng, dtype, x.shape[0], 136), offsets) / 8, x, offsets


def rowcol_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    _, offsets, _, src = maps(s, rng)
    return poisoned(wild(rng, dtype, src.shape[0], s.blocks), offsets), offsets


def gathered_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    _, offsets, row_of, src = maps(s, rng)
    return wild(rng, dtype, s.tokens, s.blocks), row_of, src, offsets


def gated_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    return rows(lambda s: 2 * s.blocks)(s, dtype, rng)


def codes_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    return reference.quantize_1x128(randn(rng, dtype, s.tokens, s.blocks))


def m_grouped_fp8_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    """Operands, and an empty tensor of the output's dtype."""
    x, offsets = rows(lambda s: s.blocks)(s, dtype, rng)
    a, scale_a = reference.quantize_1x128(x, offsets)
    used = int(offsets[-1])
    a.view(torch.uint8)[used:] = 0x7F
    scale_a[:, used:] = float("nan")
    b, _, scale_b = reference.quantize_128x128(randn(rng, dtype, s.experts, 256, s.blocks) / s.blocks**0.5)
    return a, scale_a, b, scale_b, offsets, torch.empty(0, dtype=dtype)


def k_grouped_fp8_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    x, offsets = rows(lambda s: s.blocks)(s, dtype, rng)
    g = poisoned(randn(rng, dtype, x.shape[0], 128), offsets) / 8
    (_, _, a, scale_a), (_, _, b, scale_b) = (reference.quantize_rowcol(t, offsets) for t in (g, x))
    return a, scale_a, b, scale_b, offsets, torch.empty(0, dtype=dtype)


def route_map_inputs(s: Shape, dtype: torch.dtype, rng: torch.Generator) -> Tensors:
    """Both index types in turn; a tensor whose length is the number of experts."""
    return routing(s, rng).to(torch.int32 if dtype == torch.float32 else torch.int64), torch.empty(s.experts, 0)


SWIGLU = (1.702, 7.0, 1.0)
CASES = [
    Case(
        "route_map",
        route_map_inputs,
        lambda idx, experts: ops.route_map(idx, experts.shape[0], idx.numel() + 16 * experts.shape[0], 16),
        lambda idx, experts: reference.route_map(idx, experts.shape[0], idx.numel() + 16 * experts.shape[0], 16),
        exact=True,
    ),
    Case(
        "permute",
        lambda s, dtype, rng: (randn(rng, dtype, s.tokens, s.hidden), *maps(s, rng)[2:]),
        lambda x, row_of, src: (ops.permute(x, row_of, src),),
        lambda x, row_of, src: (reference.permute(x, row_of, src),),
        exact=True,
    ),
    Case(
        "unpermute",
        unpermute_inputs,
        lambda y, row_of, src, probs: (ops.unpermute(y, row_of, src, probs), ops.unpermute(y, row_of, src)),
        lambda y, row_of, src, probs: (reference.unpermute(y, row_of, src, probs), reference.unpermute(y, row_of, src)),
    ),
    Case(
        "unpermute_bwd",
        with_gradient(unpermute_inputs, lambda s, found: (s.tokens, s.hidden)),
        op.unpermute_bwd,
        gradients(reference.unpermute),
    ),
    Case(
        "swiglu",
        rows(lambda s: 2 * s.hidden),
        lambda x, offsets: (ops.swiglu(x, offsets), ops.swiglu(x, offsets, *SWIGLU)),
        lambda x, offsets: (reference.swiglu(x, offsets), reference.swiglu(x, offsets, *SWIGLU)),
    ),
    Case(
        "swiglu_bwd",
        swiglu_bwd_inputs,
        lambda dout, x, offsets: (op.swiglu_bwd(dout, x, offsets, *SWIGLU),),
        gradients(lambda x, offsets: reference.swiglu(x, offsets, *SWIGLU)),
    ),
    Case(
        "gemm_m_grouped",
        m_grouped_inputs,
        lambda a, b, offsets: (ops.gemm_m_grouped(a, b, offsets),),
        lambda a, b, offsets: (reference.gemm_m_grouped(a, b, offsets),),
    ),
    Case(
        "gemm_m_grouped_swiglu",
        m_grouped_inputs,
        lambda a, b, offsets: (ops.gemm_m_grouped_swiglu(a, b, offsets),),
        lambda a, b, offsets: (reference.gemm_m_grouped_swiglu(a, b, offsets),),
    ),
    Case("gemm_m_grouped_dswiglu", dswiglu_inputs, dswiglu(ops), dswiglu(reference)),
    Case(
        "gemm_k_grouped",
        k_grouped_inputs,
        lambda a, b, offsets: (ops.gemm_k_grouped(a, b, offsets),),
        lambda a, b, offsets: (reference.gemm_k_grouped(a, b, offsets),),
    ),
    Case(
        "gemm_m_grouped_fp8",
        m_grouped_fp8_inputs,
        lambda *operands: (ops.gemm_m_grouped_fp8(*operands[:-1], operands[-1].dtype),),
        lambda *operands: (reference.gemm_m_grouped_fp8(*operands[:-1], torch.float64),),
        precision=1e-3,  # Hopper's tensor cores keep some 14 bits of the products in a block's sum
    ),
    Case(
        "gemm_k_grouped_fp8",
        k_grouped_fp8_inputs,
        lambda *operands: (ops.gemm_k_grouped_fp8(*operands[:-1], operands[-1].dtype),),
        lambda *operands: (reference.gemm_k_grouped_fp8(*operands[:-1], torch.float64),),
        precision=1e-3,
    ),
    Case("quantize_1x128", rowcol_inputs, ops.quantize_1x128, reference.quantize_1x128, exact=True),
    Case(
        "quantize_128x128",
        lambda s, dtype, rng: (wild(rng, dtype, 2, 256, s.blocks),),
        lambda w: ops.quantize_128x128(w, power_of_two=True),
        lambda w: reference.quantize_128x128(w, power_of_two=True),
        exact=True,
    ),
    Case("quantize_rowcol", rowcol_inputs, ops.quantize_rowcol, reference.quantize_rowcol, exact=True),
    Case(
        "permute_quantize_rowcol",
        gathered_inputs,
        lambda x, row_of, src, offsets: ops.permute_quantize_rowcol(x, (row_of, src), offsets),
        lambda x, row_of, src, offsets: reference.permute_quantize_rowcol(x, (row_of, src), offsets),
        exact=True,
    ),
    Case(
        "swiglu_quantize_rowcol",
        gated_inputs,
        lambda x, offsets: as_numbers(ops.swiglu_quantize_rowcol(x, offsets, *SWIGLU)),
        lambda x, offsets: as_numbers(reference.quantize_rowcol(reference.swiglu(x, offsets, *SWIGLU), offsets)),
        rough=2**-3,
    ),
    Case(
        "dequantize",
        codes_inputs,
        lambda q, scale: (ops.dequantize(q, scale), ops.dequantize(q, scale, torch.bfloat16)),
        lambda q, scale: (reference.dequantize(q, scale), reference.dequantize(q, scale, torch.bfloat16)),
        exact=True,
    ),
]


def as_numbers(quantized: Tensors) -> Tensors:
    """Codes and scales of `quantize_rowcol`, rows then columns, as the numbers they stand for."""
    q, scale, qt, scale_t = (t.cpu() for t in quantized)
    return reference.dequantize(q, scale), qt.float() * scale_t.t().repeat_interleave(128, 1)


def on_device(tensors: Tensors, device: torch.device) -> Tensors:
    return tuple(t.to(device) for t in tensors)


def expected_of(case: Case, inputs: Tensors) -> Tensors:
    if not case.exact:
        inputs = tuple(t.double().nan_to_num(0.0) if t.is_floating_point() else t for t in inputs)
    return case.expected(*inputs)


def bits(t: torch.Tensor) -> torch.Tensor:
    """Comparable: float8 as bytes; every NaN alike."""
    if t.dtype.itemsize == 1:
        return t.view(torch.uint8).cpu()
    return (t.nan_to_num(-7.25e9, 1e30, -1e30) if t.is_floating_point() else t).cpu()


def check(case: Case, got: Tensors, inputs: Tensors, dtype: torch.dtype) -> None:
    expected = expected_of(case, inputs)
    assert len(got) == len(expected)
    for ours, wanted in zip(got, expected, strict=True):
        assert ours.shape == wanted.shape
        if case.exact:
            assert ours.dtype == wanted.dtype
            assert torch.equal(bits(ours), bits(wanted))
        else:  # bfloat16 by its own rounding, float32 by accumulation
            rtol, atol = (2**-7, 1e-2) if dtype == torch.bfloat16 else (case.precision, 2 * case.precision)
            rtol, atol = (case.rough, 1e-2) if case.rough else (rtol, atol)
            torch.testing.assert_close(ours.double().cpu(), wanted.double(), rtol=rtol, atol=atol)
