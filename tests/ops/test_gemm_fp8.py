"""float8 products against float64 oracles on the same codes and scales, and end to end against unquantized products."""

import pytest
import torch

from xtuner import _C, build_info, ops
from xtuner.ops import OpError, reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
COUNTS = [[], [0, 0], [1], [7, 0, 2], [127, 129], [8, 128, 300, 0, 1]]


@pytest.fixture(params=build_info()["isas"])
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


def operands(counts, k, n, formats=(E4M3, E4M3), tail=3, seed=0):
    """x [R, K], w [E, N, K] and g [R, N] in float32, with NaN in the rows nobody may read; offsets."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = sum(counts) + tail
    x, g = (torch.randn(rows, size, generator=generator) for size in (k, n))
    x, g = x * torch.logspace(-2, 2, rows)[:, None], g * 1e-3
    x[sum(counts) :] = float("nan")
    g[sum(counts) :] = float("nan")
    return x, torch.randn(len(counts), n, k, generator=generator) / k**0.5, g, offsets


def close(ours, expected, scale_of_terms):
    """Within the rounding of float32 sums, relative to the sum of absolute terms, plus that of the output's dtype."""
    tolerance = 4e-6 * scale_of_terms + expected.abs() * (2**-8 if ours.dtype == torch.bfloat16 else 2**-23)
    assert ((ours.double() - expected).abs() <= tolerance).all()


def magnitudes(q):
    return (q.view(torch.uint8) & 0x7F).view(q.dtype)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize("counts", COUNTS)
def test_gemm_m_grouped_fp8(isa, counts, formats, out_dtype):
    x, w, _, offsets = operands(counts, 384, 256)
    q, scale = ops.quantize_1x128(x, offsets, formats[0])
    wq, wt, w_scale = ops.quantize_128x128(w, formats[1])
    q.view(torch.uint8)[sum(counts) :] = 0x7F  # NaN that must not be read
    scale[:, sum(counts) :] = float("nan")
    ours = ops.gemm_m_grouped_fp8(q, scale, wq, w_scale, offsets, out_dtype)
    arguments = (offsets, torch.float64)
    expected = reference.gemm_m_grouped_fp8(q, scale, wq, w_scale, *arguments)
    close(ours, expected, reference.gemm_m_grouped_fp8(magnitudes(q), scale, magnitudes(wq), w_scale, *arguments))
    assert (ours[sum(counts) :] == 0).all()
    # the other orientation: the data gradient's operand, with scales that are a view
    q, scale = ops.quantize_1x128(torch.nan_to_num(x @ torch.eye(384, 256)), offsets, formats[0])
    turned = w_scale.transpose(1, 2)
    ours = ops.gemm_m_grouped_fp8(q, scale, wt, turned, offsets, out_dtype)
    expected = reference.gemm_m_grouped_fp8(q, scale, wt, turned, *arguments)
    close(ours, expected, reference.gemm_m_grouped_fp8(magnitudes(q), scale, magnitudes(wt), turned, *arguments))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize("counts", COUNTS[1:])
def test_gemm_k_grouped_fp8(isa, counts, formats, out_dtype):
    x, _, g, offsets = operands(counts, 128, 256)
    _, _, gt, g_scale = ops.quantize_rowcol(g, offsets, formats[0])
    _, _, xt, x_scale = ops.quantize_rowcol(x, offsets, formats[1])
    arguments = (gt, g_scale, xt, x_scale, offsets)
    ours = ops.gemm_k_grouped_fp8(*arguments, out_dtype)
    expected = reference.gemm_k_grouped_fp8(*arguments, torch.float64)
    size = reference.gemm_k_grouped_fp8(magnitudes(gt), g_scale, magnitudes(xt), x_scale, offsets, torch.float64)
    close(ours, expected, size)
    start = torch.randn(expected.shape).to(out_dtype)
    for beta in (0.0, 1.0):
        out = start.clone() if beta else torch.full_like(start, float("nan"))
        close(ops.gemm_k_grouped_fp8_(out, *arguments, beta), expected + beta * start.double(), size + start.abs())
        for e, count in enumerate(counts):
            assert count or torch.equal(out[e], beta * start[e])


# One term per block: the result then shows the order and the roundings of the promotion itself.
@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_promotion_is_a_float32_sum_over_blocks_in_order(isa, blocks):
    generator = torch.Generator().manual_seed(blocks)
    rows, n, k = 5, 128, 128 * blocks
    q, w = torch.zeros(rows, k), torch.zeros(1, n, k)
    q[:, ::128] = torch.randint(-8, 9, (rows, blocks), generator=generator).float()
    w[:, :, ::128] = torch.randint(-8, 9, (1, n, blocks), generator=generator).float()
    scale, w_scale = torch.rand(blocks, 8, generator=generator), torch.rand(1, 1, blocks, generator=generator)
    ours = ops.gemm_m_grouped_fp8(q.to(E4M3), scale, w.to(E4M3), w_scale, torch.tensor([0, rows]), torch.float32)
    expected = torch.zeros(rows, n, dtype=torch.float64)
    for b in range(blocks):
        factor = scale[b, :rows, None] * w_scale[0, 0, b]  # rounded to float32
        product = (q[:, 128 * b, None] * w[0, :, 128 * b]).double() * factor.double()
        if isa == "portable":  # no fused multiply-add
            product = product.float().double()
        expected = (expected + product).float().double()
    assert torch.equal(ours.double(), expected)


def test_a_recipe_end_to_end():
    """All three products of a layer, quantized, stay within a few percent of the exact ones."""
    x, w, g, offsets = operands([70, 0, 200, 130], 512, 256, tail=0)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    xq, x_scale, xt, xt_scale = ops.quantize_rowcol(x, offsets)
    gq, g_scale, gt, gt_scale = ops.quantize_rowcol(g, offsets)
    wq, wt, w_scale = ops.quantize_128x128(w)
    results = [
        (ops.gemm_m_grouped_fp8(xq, x_scale, wq, w_scale, offsets), reference.gemm_m_grouped(x, w, offsets)),
        (
            ops.gemm_m_grouped_fp8(gq, g_scale, wt, w_scale.transpose(1, 2), offsets),
            reference.gemm_m_grouped(g, w, offsets, False),
        ),
        (ops.gemm_k_grouped_fp8(gt, gt_scale, xt, xt_scale, offsets), reference.gemm_k_grouped(g, x, offsets)),
    ]
    for ours, exact in results:
        assert (ours.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("place", ["codes", "scale"])
def test_nan_reaches_its_row_and_no_other(place):
    x, w, _, offsets = operands([4, 5], 256, 128, tail=0)
    q, scale = ops.quantize_1x128(x)
    wq, _, w_scale = ops.quantize_128x128(w)
    if place == "codes":
        q.view(torch.uint8)[2, 200] = 0x7F
    else:
        scale[1, 2] = float("nan")
    out = ops.gemm_m_grouped_fp8(q, scale, wq, w_scale, offsets)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4, 5, 6, 7, 8]].isfinite().all()


def test_same_bits_for_any_thread_count():
    x, w, g, offsets = operands([300, 0, 5, 150], 384, 256)
    quantized = ops.quantize_rowcol(x, offsets), ops.quantize_rowcol(g, offsets), ops.quantize_128x128(w)
    before = torch.get_num_threads()

    def run():
        (q, scale, xt, xt_scale), (_, _, gt, gt_scale), (wq, _, w_scale) = quantized
        return (
            ops.gemm_m_grouped_fp8(q, scale, wq, w_scale, offsets, torch.float32),
            ops.gemm_k_grouped_fp8(gt, gt_scale, xt, xt_scale, offsets),
        )

    expected = run()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_bad_input_names_the_argument():
    x, w, g, offsets = operands([4, 5], 256, 128, tail=0)
    q, scale = ops.quantize_1x128(x)
    wq, _, w_scale = ops.quantize_128x128(w)
    with pytest.raises(OpError, match="gemm_m_grouped_fp8: a must be float8_e4m3fn or float8_e5m2"):
        ops.gemm_m_grouped_fp8(x, scale, wq, w_scale, offsets)
    with pytest.raises(OpError, match="scale_a must have a column for each of the R=9 rows, got 4"):
        ops.gemm_m_grouped_fp8(q, scale[:, :4].contiguous(), wq, w_scale, offsets)
    with pytest.raises(OpError, match=r"scale_b must be float32 \[E=2, N/128=1, K/128=2\]"):
        ops.gemm_m_grouped_fp8(q, scale, wq, w_scale.transpose(1, 2), offsets)
    _, _, xt, xt_scale = ops.quantize_rowcol(x, offsets)
    with pytest.raises(OpError, match="the padded rows of expert 1 end at 256, past the P=128 columns there are"):
        ops.gemm_k_grouped_fp8(*[xt[:, :128].contiguous(), xt_scale[:1]] * 2, offsets)
    with pytest.raises(OpError, match="beta must be 0 or 1"):
        ops.gemm_k_grouped_fp8_(torch.zeros(2, 256, 256), *[xt, xt_scale] * 2, offsets, 0.5)


def test_backward_is_refused():
    x, w, _, offsets = operands([4, 5], 256, 128, tail=0)
    q, scale = ops.quantize_1x128(x.requires_grad_())
    wq, _, w_scale = ops.quantize_128x128(w)
    with pytest.raises(NotImplementedError, match="gemm_m_grouped_fp8 cannot be differentiated"):
        ops.gemm_m_grouped_fp8(q, scale, wq, w_scale, offsets).sum().backward()
