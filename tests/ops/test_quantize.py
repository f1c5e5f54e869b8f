"""float8: every code and rounding tie against torch's own conversions, quantizers against their oracles, bit by bit."""

import pytest
import torch

from xtuner import _C, build_info, ops
from xtuner.ops import OpError, reference

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=build_info()["isas"])
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


def equal_bits(ours, expected):
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    if ours.dtype in FORMATS:
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))
    else:
        assert torch.equal(ours.nan_to_num(-7.0), expected.nan_to_num(-7.0))


def wild(*shape, dtype=torch.float32, seed=0):
    """Blocks of very different sizes, among them zeros, subnormal numbers, NaN and both infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    blocks = x.unflatten(-1, (-1, 128))
    exponents = torch.randint(-160, 100, (*blocks.shape[:-1], 1), generator=generator)
    blocks = torch.ldexp(torch.ldexp(blocks, exponents // 2), exponents - exponents // 2)
    blocks = torch.where(torch.rand(*blocks.shape[:-1], 1, generator=generator) < 0.1, 0.0, blocks)
    x = blocks.flatten(-2)
    for value in (float("nan"), float("inf"), float("-inf")):
        x.view(-1)[torch.randint(max(1, x.numel()), (min(x.numel(), 2),), generator=generator)] = value
    return x.to(dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_all_codes_widen_as_in_torch(isa, format):
    codes = torch.arange(256, dtype=torch.uint8).view(format).view(2, 128)
    ours, expected = ops.dequantize(codes, torch.ones(1, 2)), codes.float()
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.signbit(), expected.signbit())
    assert torch.equal(ours.nan_to_num(nan=0.0, posinf=1e9, neginf=-1e9), expected.nan_to_num(0.0, 1e9, -1e9))


@pytest.mark.parametrize("format", FORMATS)
def test_all_ties_and_their_neighbours_narrow_as_in_torch(isa, format):
    numbers = torch.arange(128, dtype=torch.uint8).view(format).float()
    numbers = numbers[numbers.isfinite()]
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9))])
    x = torch.cat([x, numbers.nextafter(torch.tensor(0.0)), numbers[:-1].nextafter(torch.tensor(1e9))])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x, (0, -x.numel() % 127)).view(-1, 127)
    x = torch.cat([torch.full((x.shape[0], 1), numbers[-1].item()), x], dim=1)  # makes every scale 1
    q, scale = ops.quantize_1x128(x, dtype=format)
    assert (scale[:, : x.shape[0]] == 1).all()
    equal_bits(q, x.to(format))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 127, 128, 129])
def test_quantize_1x128(rows, power_of_two, format, dtype):
    x = wild(rows, 384, dtype=dtype, seed=rows)
    for ours, expected in zip(
        ops.quantize_1x128(x, None, format, power_of_two),
        reference.quantize_1x128(x, None, format, power_of_two),
        strict=True,
    ):
        equal_bits(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_quantize_128x128(power_of_two, format, dtype):
    w = wild(3, 256, 768, dtype=dtype)
    for ours, expected in zip(
        ops.quantize_128x128(w, format, power_of_two), reference.quantize_128x128(w, format, power_of_two), strict=True
    ):
        equal_bits(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("counts", [[], [0, 0], [1], [127, 0, 2], [128, 129], [7, 8, 300, 0, 1]])
def test_quantize_rowcol(isa, counts, format, dtype):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    x = wild(sum(counts) + 5, 256, dtype=dtype, seed=sum(counts))
    x[sum(counts) :] = float("nan")  # never read
    ours = ops.quantize_rowcol(x, offsets, format)
    for got, expected in zip(ours, reference.quantize_rowcol(x, offsets, format), strict=True):
        equal_bits(got, expected)
    for got, expected in zip(ops.quantize_1x128(x, offsets, format), ours, strict=False):
        equal_bits(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "experts"), [(0, 2), (1, 1), (129, 5), (300, 2)])
def test_permute_quantize_rowcol(isa, tokens, experts, format, dtype):
    x = wild(tokens, 256, dtype=dtype, seed=tokens)
    idx = torch.randint(-1, experts, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    _, offsets, *maps = ops.route_map(idx, experts, 3 * tokens + 16 * experts, align=16)
    rule = {"dtype": format, "power_of_two": tokens == 129}
    ours = ops.permute_quantize_rowcol(x, maps, offsets, **rule)
    for got, fused, expected in zip(
        ours,
        ops.quantize_rowcol(ops.permute(x, *maps), offsets, **rule),
        reference.permute_quantize_rowcol(x, maps, offsets, **rule),
        strict=True,
    ):
        equal_bits(got, fused)
        equal_bits(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scalars", [(1.0, None, 0.0), (1.702, 7.0, 1.0)])
@pytest.mark.parametrize("counts", [[], [0, 0], [1], [128, 0, 129]])
def test_swiglu_quantize_rowcol(isa, counts, scalars, format, dtype):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    x = 3 * torch.randn(sum(counts) + 5, 512, generator=torch.Generator().manual_seed(sum(counts))).to(dtype)
    x[sum(counts) :] = float("nan")
    ours = ops.swiglu_quantize_rowcol(x, offsets, *scalars, dtype=format)
    for got, expected in zip(
        ours, ops.quantize_rowcol(ops.swiglu(x, offsets, *scalars), offsets, format), strict=True
    ):
        equal_bits(got, expected)
    q, scale, *_ = reference.quantize_rowcol(reference.swiglu(x.double(), offsets, *scalars).to(dtype), offsets, format)
    step = 2**-3 if format == torch.float8_e4m3fn else 2**-2  # rounding of the activation may move a code
    near = ops.dequantize(*ours[:2]), ops.dequantize(q, scale)
    torch.testing.assert_close(*near, rtol=step, atol=float(scale.amax()) * 2**-8 if len(q) else 0)


def test_fused_quantizers_name_bad_arguments():
    offsets = torch.tensor([0, 2])
    maps = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(OpError, match=r"permute_quantize_rowcol: src\[1\] must be in \[-1, T\*K=2\), got 9"):
        ops.permute_quantize_rowcol(torch.zeros(2, 128), maps, offsets)
    with pytest.raises(OpError, match="swiglu_quantize_rowcol: H must be a multiple of 128"):
        ops.swiglu_quantize_rowcol(torch.zeros(2, 128), offsets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize(isa, format, dtype):
    x, w = torch.randn(37, 256), torch.randn(2, 128, 384)
    q, scale = ops.quantize_1x128(x, dtype=format)
    wq, _, w_scale = ops.quantize_128x128(w, dtype=format)
    equal_bits(ops.dequantize(q, scale, dtype), reference.dequantize(q, scale, dtype))
    equal_bits(ops.dequantize(wq, w_scale, dtype), reference.dequantize(wq, w_scale, dtype))
    step = 2**-4 if format == torch.float8_e4m3fn else 2**-3  # relative, of normal numbers
    assert ((ops.dequantize(q, scale) - x).abs() <= x.abs() * step + scale.amax() * 2**-10).all()


def test_extremes_of_a_block_are_the_extreme_codes():
    x = torch.randn(64, 1024) * torch.logspace(-6, 6, 64)[:, None]
    q, _ = ops.quantize_1x128(x)
    assert (q.float().abs().unflatten(1, (-1, 128)).amax(-1) == 448).all()


def test_same_bits_for_any_thread_count():
    x, offsets = wild(700, 1280), torch.tensor([0, 3, 3, 650])
    before = torch.get_num_threads()
    expected, gated = ops.quantize_rowcol(x, offsets), ops.swiglu_quantize_rowcol(x, offsets)
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            for got, wanted in zip(ops.quantize_rowcol(x, offsets), expected, strict=True):
                equal_bits(got, wanted)
            for got, wanted in zip(ops.swiglu_quantize_rowcol(x, offsets), gated, strict=True):
                equal_bits(got, wanted)
    finally:
        torch.set_num_threads(before)


def test_flush_to_zero_changes_nothing():
    x = wild(64, 256)
    expected = ops.quantize_1x128(x)
    torch.set_flush_denormal(True)
    try:
        for got, wanted in zip(ops.quantize_1x128(x), expected, strict=True):
            equal_bits(got, wanted)
    finally:
        torch.set_flush_denormal(False)


def test_bad_input_names_the_argument():
    with pytest.raises(OpError, match="quantize_1x128: H must be a multiple of 128 .* got 96; use bfloat16"):
        ops.quantize_1x128(torch.randn(4, 96))
    with pytest.raises(OpError, match="quantize_1x128: q must be float8_e4m3fn or float8_e5m2"):
        ops.quantize_1x128(torch.randn(4, 128), dtype=torch.bfloat16)
    with pytest.raises(OpError, match="eps must be in"):
        ops.quantize_1x128(torch.randn(4, 128), eps=0.0)


def test_backward_is_refused():
    x = torch.randn(4, 128, requires_grad=True)
    q, scale = ops.quantize_1x128(x)
    with pytest.raises(NotImplementedError, match="quantize_1x128 cannot be differentiated: float8 has no gradient"):
        scale.sum().backward()
    with pytest.raises(NotImplementedError, match="dequantize cannot be differentiated"):
        ops.dequantize(q, scale).sum().backward()
