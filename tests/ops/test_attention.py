"""Attention beyond the common case: runs of equal documents, empty ones, narrow values, bf16, bad input."""

import pytest
import torch

from xtuner import ops
from xtuner.ops import OpError, reference
from xtuner.ops.attention import _check as check_for_cuda


def packed(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def qkv(num_q, num_k, heads=(6, 2), widths=(16, 16), dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_q + num_k)
    shapes = (num_q, heads[0], widths[0]), (num_k, heads[1], widths[0]), (num_k, heads[1], widths[1])
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def compare(inputs, cu_q, cu_k, tolerance, **options):
    """Output and gradients against the oracle in float64."""
    bounds = cu_q, cu_k, int(cu_q.diff().max()), int(cu_k.diff().max())
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    out = ops.attention(*ours, *bounds, **options)
    expected = reference.attention(*exact, *bounds, **options)
    assert out.shape == expected.shape and out.dtype == inputs[0].dtype
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    out.backward(grad)
    expected.backward(grad.double())
    for a, b in zip([out, *(x.grad for x in ours)], [expected, *(x.grad for x in exact)], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


LENGTHS = [[7, 7, 7], [1, 1, 1, 1], [3, 0, 0, 9, 9, 2], [70], [5, 40, 40, 5]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_runs_of_equal_documents(lengths, causal):
    cu = packed(lengths)
    compare(qkv(sum(lengths), sum(lengths)), cu, cu, 2e-5, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_more_keys_than_queries_with_gradient(causal):
    cu_q, cu_k = packed([1, 1, 4, 4, 3]), packed([6, 6, 9, 9, 3])
    compare(qkv(13, 33), cu_q, cu_k, 2e-5, causal=causal, scale=0.3)


def test_values_narrower_than_keys():
    cu = packed([5, 8, 8])
    compare(qkv(21, 21, widths=(24, 8)), cu, cu, 2e-5)


def test_bf16():
    cu = packed([33, 20, 20])
    compare(qkv(73, 73, dtype=torch.bfloat16), cu, cu, 3e-2)


def test_a_document_never_sees_another():
    cu = packed([4, 6])
    q, k, v = qkv(10, 10)
    before = ops.attention(q, k, v, cu, cu, 6, 6)
    k[:4], v[:4] = 100.0, float("inf")
    assert torch.equal(ops.attention(q, k, v, cu, cu, 6, 6)[4:], before[4:])


def test_documents_without_queries_or_keys():
    q, k, v = (x.requires_grad_() for x in qkv(3, 5))
    cu_q, cu_k = packed([0, 2, 1]), packed([4, 0, 1])
    out = ops.attention(q, k, v, cu_q, cu_k, 2, 4, causal=False)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))  # nothing to look at
    torch.testing.assert_close(out[2], v[4].repeat_interleave(3, 0))
    out.sum().backward()
    assert not k.grad[:4].any() and not v.grad[:4].any() and not q.grad[:2].any() and v.grad[4].any()


def test_no_tokens():
    q, k, v = qkv(0, 0)
    cu = torch.zeros(1, dtype=torch.int32)
    assert ops.attention(q, k, v, cu, cu, 0, 0).shape == (0, 6, 16)


def bad_calls():
    q, k, v = qkv(8, 8)
    cu = packed([3, 5])
    return {
        "q must be float32 or bfloat16 \\[Tq, Hq, D\\], got float32 \\[8, 96\\]": (q.flatten(1), k, v, cu, cu),
        "k must be float32 \\[Tk, Hkv, D=16\\], got bfloat16": (q, k.bfloat16(), v, cu, cu),
        "v must be contiguous in its last dim": (q, k, v.transpose(1, 2).contiguous().transpose(1, 2), cu, cu),
        "q has 5 heads, which is no multiple of k's 2": (q[:, :5], k, v, cu, cu),
        "k must be float32 \\[Tk, Hkv, D=16\\], got float32 \\[8, 2, 8\\]": (q, k[..., :8], v, cu, cu),
        "v must be float32 \\[Tk=8, Hkv=2, Dv\\], got float32 \\[7, 2, 16\\]": (q, k, v[:7], cu, cu),
        "v must not be wider than q and k, got Dv=16 and D=8": (q[..., :8], k[..., :8], v, cu, cu),
        "cu_k must be int32": (q, k, v, cu, cu.long()),
        "cu_q must go from 0 to 8, but goes from 0 to 7": (q, k, v, packed([3, 4]), cu),
        "document 1 has -1 queries and 5 keys": (q, k, v, torch.tensor([0, 9, 8], dtype=torch.int32), packed([3, 5])),
        "document 0 has 5 queries but 3 keys; causal needs as many": (q, k, v, packed([5, 3]), cu),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input(message):
    causal = "causal" in message
    with pytest.raises(OpError, match=f"attention: {message}"):
        ops.attention(*bad_calls()[message], 9, 9, causal=causal)


@pytest.mark.parametrize(
    "message, shapes",
    [
        ("q must be \\[tokens, heads, width\\], got shape \\[8, 96\\]", [(8, 96), (8, 2, 16), (8, 2, 16)]),
        ("q .*, k .* and v .* do not fit together", [(8, 6, 16), (8, 2, 8), (8, 2, 16)]),
        ("q has 5 heads, which is no multiple of k's 2", [(8, 5, 16), (8, 2, 16), (8, 2, 16)]),
    ],
)
def test_checks_before_torchs_kernel_for_cuda(message, shapes):
    cu = packed([3, 5])
    with pytest.raises(OpError, match=f"attention: {message}"):
        check_for_cuda(*(torch.zeros(s) for s in shapes), cu, cu)


@pytest.mark.parametrize("causal", [True, False])
def test_parts_of_a_fused_projection(causal):
    fused = torch.randn(70, 10, 24, generator=torch.Generator().manual_seed(1))
    fused[..., 16:] = float("nan")
    q, k, v = fused[..., :16].split([6, 2, 2], dim=1)
    cu = packed([30, 40])
    bounds = cu, cu, 40, 40
    out = ops.attention(q, k, v, *bounds, causal=causal)
    torch.testing.assert_close(out, ops.attention(*(x.contiguous() for x in (q, k, v)), *bounds, causal=causal))
    torch.testing.assert_close(out, reference.attention(q, k, v, *bounds, causal=causal))


def test_double_backward_is_an_error_not_a_zero():
    q, k, v = (x.requires_grad_() for x in qkv(4, 4))
    cu = packed([4])
    (grad,) = torch.autograd.grad(ops.attention(q, k, v, cu, cu, 4, 4).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_bwd cannot be differentiated"):
        grad.sum().backward()
    x = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.swiglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="swiglu_bwd cannot be differentiated"):
        grad.sum().backward()
