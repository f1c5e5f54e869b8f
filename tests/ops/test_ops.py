"""Every op against its oracle in float64, and the contracts of torch.library."""

import pytest
import torch

from xtuner import ops
from xtuner.ops import OpError, reference

DTYPES = [torch.float32, torch.bfloat16]
# (tokens, choices, experts); the routing leaves some experts without tokens and drops some choices.
LAYOUTS = [(37, 2, 5), (64, 4, 7), (1, 1, 1), (16, 3, 40), (0, 2, 3), (130, 1, 2)]

ALONE = ops.HostEpGroup(0, 1, lambda mine: [mine])  # expert parallelism without anybody else


def routing(tokens, k, experts, seed=0, drop=0.1):
    generator = torch.Generator().manual_seed(seed)
    idx = (torch.rand(tokens, k, generator=generator) ** 2 * experts).long()  # skewed to low experts
    return idx.masked_fill(torch.rand(tokens, k, generator=generator) < drop, -1)


def maps(tokens, k, experts, spare=3):
    idx = routing(tokens, k, experts)
    return ops.route_map(idx, experts, capacity=idx.numel() + spare)


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poison_tail(x, offsets):
    """NaN in the rows nobody may read."""
    x = x.clone()
    x[int(offsets[-1]) :] = float("nan")
    return x


def check(ours, expected, dtype):
    """bf16 results may be off by their own rounding; float32 by accumulation."""
    tolerance = {"rtol": 2**-7, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(ours.double(), expected.double(), **tolerance)


def compare(name, inputs, arguments, dtype, clean=None):
    """Forward and every gradient of op `name` against the oracle; `clean` are inputs without poison."""
    inputs = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in (clean or inputs)]
    out = getattr(ops, name)(*inputs, *arguments)
    expected = getattr(reference, name)(*exact, *arguments)
    assert out.dtype == dtype
    check(out, expected, dtype)
    grad = randn(*out.shape, dtype=dtype, seed=9)
    out.backward(grad)
    expected.backward(grad.double())
    for x, e in zip(inputs, exact, strict=True):
        check(x.grad, e.grad, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_route_map(layout, align, index_dtype):
    idx = routing(*layout).to(index_dtype)
    ours = ops.route_map(idx, layout[2], align=align)
    for a, b in zip(ours, reference.route_map(idx, layout[2], align=align), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_permute(layout, dtype):
    _, _, row_of, src = maps(*layout)
    compare("permute", [randn(layout[0], 24, dtype=dtype)], [row_of, src], dtype)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpermute(layout, dtype, weighted):
    _, offsets, row_of, src = maps(*layout)
    y = randn(src.shape[0], 24, dtype=dtype).requires_grad_()
    probs = torch.rand(row_of.shape, generator=torch.Generator().manual_seed(3)).requires_grad_() if weighted else None
    out = ops.unpermute(poison_tail(y, offsets), row_of, src, probs)
    exact = y.detach().double().requires_grad_()
    exact_probs = probs.detach().double().requires_grad_() if weighted else None
    expected = reference.unpermute(exact, row_of, src, exact_probs)
    check(out, expected, dtype)
    grad = randn(*out.shape, dtype=dtype, seed=9)
    out.backward(grad)
    expected.backward(grad.double())
    check(y.grad, exact.grad, dtype)
    if weighted:
        assert probs.grad.dtype == torch.float32
        torch.testing.assert_close(probs.grad.double(), exact_probs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trans_b", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 48), (17, 5), (1, 33)])
def test_gemm_m_grouped(layout, shape, dtype, trans_b):
    _, offsets, _, src = maps(*layout)
    kd, n = shape
    clean = randn(src.shape[0], kd, dtype=dtype) / 4
    clean[int(offsets[-1]) :] = 0
    b = randn(layout[2], *((n, kd) if trans_b else (kd, n)), dtype=dtype, seed=2) / 4
    compare("gemm_m_grouped", [poison_tail(clean, offsets), b], [offsets, trans_b], dtype, clean=[clean, b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gemm_k_grouped(layout, dtype):
    _, offsets, _, src = maps(*layout)
    clean = [randn(src.shape[0], n, dtype=dtype, seed=n) / 4 for n in (19, 33)]
    poisoned = [poison_tail(x, offsets) for x in clean]
    compare("gemm_k_grouped", poisoned, [offsets], dtype, clean=clean)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_gemm_k_grouped_in_place(beta):
    _, offsets, _, src = maps(37, 2, 9)
    a, b = randn(src.shape[0], 8), randn(src.shape[0], 12, seed=2)
    out = randn(9, 8, 12, seed=3)
    expected = beta * out + reference.gemm_k_grouped(a, b, offsets)
    torch.testing.assert_close(ops.gemm_k_grouped_(out, a, b, offsets, beta), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scalars", [(1.0, None, 0.0), (1.702, 1.5, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_swiglu(layout, dtype, scalars):
    _, offsets, _, src = maps(*layout)
    clean = 2 * randn(src.shape[0], 38, dtype=dtype)
    compare("swiglu", [poison_tail(clean, offsets)], [offsets, *scalars], dtype, clean=[clean])
    compare("swiglu", [clean.detach()], [None, *scalars], dtype)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(heads, causal):
    cu = torch.tensor([0, 5, 6, 30, 30, 64], dtype=torch.int32)
    inputs = [randn(64, h, 16, seed=i) for i, h in enumerate((heads[0], heads[1], heads[1]))]
    compare("attention", inputs, [cu, cu, 34, 34, None, causal], torch.float32)


def test_attention_with_more_keys_than_queries():
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 1, 4, 8], [0, 9, 16, 20]))
    q, k, v = (randn(t, h, 8, seed=i) for i, (t, h) in enumerate([(8, 4), (20, 2), (20, 2)]))
    arguments = [cu_q, cu_k, 4, 9]
    torch.testing.assert_close(ops.attention(q, k, v, *arguments), reference.attention(q, k, v, *arguments))


def samples():
    """One call of every op, by schema name."""
    _, offsets, row_of, src = maps(12, 2, 3)
    rows = src.shape[0]

    def grad(*shape, seed=1):
        return randn(*shape, seed=seed).requires_grad_()

    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    qkv = [grad(12, 2, 8, seed=i) for i in range(3)]
    probs = torch.rand(row_of.shape)
    fp8 = ops.quantize_rowcol(randn(rows, 128), offsets)
    fp8_weights = ops.quantize_128x128(randn(3, 256, 128))[::2]
    with torch.no_grad():
        out, lse = torch.ops.xtuner.attention(*qkv, cu, cu, 7, 7, 0.3, True)
    bounds = (cu, cu, 7, 7, 0.3, True)
    idx = routing(12, 2, 3)
    route = ops.ep_prepare(idx, 3, ALONE)
    ep_maps, ep_rows = (route.counts, route.dest), int(route.offsets[-1])
    probs_TE, lse_T = randn(12, 5).softmax(-1), randn(12)
    return {
        "route_map": (routing(12, 2, 3), 3, 27, 1),
        "topk_softmax": (grad(12, 5), torch.rand(5), None, 2, True),
        "topk_softmax_bwd": (randn(12, 2), randn(5), torch.tensor(0.3), probs_TE, lse_T, idx % 5, True),
        "permute": (grad(12, 8), row_of, src),
        "unpermute": (grad(rows, 8), row_of, src, probs.clone().requires_grad_()),
        "ep_prepare": (idx, 3, ALONE.id, None),
        "ep_dispatch": (grad(12, 8), *route, ALONE.id),
        "ep_dispatch_quantized": (*ops.quantize_1x128(randn(12, 128)), *route, ALONE.id),
        "ep_combine": (grad(ep_rows, 8), *ep_maps, probs.clone().requires_grad_(), ALONE.id, True),
        "ep_combine_bwd": (randn(12, 8), randn(ep_rows, 8), *ep_maps, probs, ALONE.id),
        "unpermute_bwd": (randn(12, 8), randn(rows, 8), row_of, src, probs),
        "gemm_m_grouped": (grad(12, 8), grad(3, 6, 8), offsets, True, grad(3, 6), row_of, src),
        "gemm_m_grouped_swiglu": (grad(12, 8), grad(3, 6, 8), offsets, grad(3, 6), row_of, src, 1.0, None, 0.0),
        "gemm_m_grouped_dswiglu": (
            randn(rows, 6), randn(3, 6, 4), offsets, randn(rows, 8), torch.rand(rows), 1.0, None, 0.0,
        ),
        "gemm_k_grouped": (grad(rows, 8), grad(12, 6), offsets, torch.float32, row_of, src),
        "gemm_k_grouped_": (randn(3, 8, 6), randn(rows, 8), randn(rows, 6), offsets, 1.0),
        "linear": (grad(9, 8), grad(6, 8)),
        "linear_dgrad": (randn(9, 6), randn(6, 8)),
        "linear_wgrad": (randn(9, 6), randn(9, 8)),
        "linear_qkv": (grad(9, 8), grad(6, 8), grad(4, 8), grad(3, 8)),
        "linear_qkv_bwd": (
            randn(9, 6), randn(9, 4), randn(9, 3), randn(9, 8), randn(6, 8), randn(4, 8), randn(3, 8), True, True,
        ),
        "rms_norm": (grad(9, 8), grad(8), 1e-6),
        "rms_norm_bwd": (randn(9, 8), randn(9, 8), randn(8), torch.rand(9)),
        "rms_norm_rotary": (grad(9, 2, 8), grad(8), randn(9, 4), randn(9, 4), 1e-6),
        "rms_norm_rotary_bwd": (
            randn(9, 2, 8),
            randn(9, 2, 8),
            randn(8),
            randn(9, 4),
            randn(9, 4),
            torch.rand(9, 2),
        ),
        "rotary": (grad(9, 2, 8), randn(9, 4), randn(9, 4), False),
        "linear_cross_entropy": (grad(9, 8), grad(6, 8), torch.arange(9) % 6, torch.rand(9), True, True),
        "swiglu": (grad(rows, 8), offsets, 1.0, None, 0.0),
        "swiglu_bwd": (randn(rows, 4), randn(rows, 8), offsets, 1.0, None, 0.0),
        "quantize_1x128": (randn(5, 128), None, torch.float8_e4m3fn, False, 1e-12),
        "quantize_128x128": (randn(2, 128, 256), torch.float8_e4m3fn, True, 1e-12),
        "quantize_rowcol": (randn(rows, 128), offsets, torch.float8_e5m2, False, 1e-12),
        "permute_quantize_rowcol": (randn(12, 128), src, 2, offsets, torch.float8_e4m3fn, False, 1e-12),
        "swiglu_quantize_rowcol": (randn(rows, 256), offsets, 1.0, 7.0, 0.0, torch.float8_e4m3fn, True, 1e-12),
        "gemm_m_grouped_fp8": (*fp8[:2], *fp8_weights, offsets, torch.bfloat16),
        "gemm_k_grouped_fp8": (*fp8[2:], *fp8[2:], offsets, torch.float32),
        "gemm_k_grouped_fp8_": (randn(3, 128, 128), *fp8[2:], *fp8[2:], offsets, 1.0),
        "dequantize": (randn(5, 128).to(torch.float8_e4m3fn), torch.rand(1, 8), torch.bfloat16),
        "to_host": (randn(5, 8),),
        "to_device": (randn(5, 8), torch.device("cpu")),
        "attention": (*qkv, *bounds),
        "attention_bwd": (randn(12, 2, 8), *(x.detach() for x in qkv), out, lse, *bounds),
    }


def test_samples_cover_every_op():
    registered = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "xtuner::" in n}
    assert registered == set(samples())


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name):
    arguments, checks = samples()[name], list(torch.library.opcheck.__kwdefaults__["test_utils"])
    if any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 for x in arguments):
        checks.remove("test_schema")  # compares inputs with arithmetic that torch lacks for float8
    torch.library.opcheck(getattr(torch.ops.xtuner, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_same_bits_for_any_thread_count(num_threads):
    _, offsets, row_of, src = maps(300, 4, 9)
    a, b = randn(src.shape[0], 40), randn(9, 24, 40, seed=2)
    before = torch.get_num_threads()

    def run():
        c = ops.gemm_m_grouped(a, b, offsets)
        return c, ops.gemm_k_grouped(a, c, offsets), ops.unpermute(c, row_of, src)

    expected = run()
    torch.set_num_threads(num_threads)
    try:
        assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_bad_input_names_the_argument():
    _, offsets, row_of, src = maps(12, 2, 3)
    x, b = randn(src.shape[0], 8), randn(3, 6, 8)
    with pytest.raises(OpError, match="route_map: topk_idx.*7"):
        ops.route_map(torch.tensor([[0], [7]]), num_experts=3)
    with pytest.raises(OpError, match="route_map: .*-2"):
        ops.route_map(torch.tensor([[-2]]), num_experts=3)
    with pytest.raises(OpError, match="route_map.*src.*2"):
        ops.route_map(torch.tensor([[0], [1]]), num_experts=3, capacity=1)
    with pytest.raises(OpError, match="gemm_m_grouped: a .*contiguous"):
        ops.gemm_m_grouped(randn(8, src.shape[0]).T, b, offsets)
    with pytest.raises(OpError, match="gemm_m_grouped: .*dtype|gemm_m_grouped: .*float64"):
        ops.gemm_m_grouped(x.double(), b.double(), offsets)
    with pytest.raises(OpError, match="gemm_m_grouped: b"):
        ops.gemm_m_grouped(x, b.bfloat16(), offsets)
    with pytest.raises(OpError, match="gemm_m_grouped: b"):
        ops.gemm_m_grouped(x, randn(3, 6, 9), offsets)
    with pytest.raises(OpError, match="offsets"):
        ops.gemm_m_grouped(x, b, offsets.int())
    with pytest.raises(OpError, match="swiglu: x"):
        ops.swiglu(randn(4, 7))
    with pytest.raises(OpError, match="permute: src"):
        ops.permute(randn(12, 8), row_of, src.long())
    assert issubclass(OpError, ValueError)
