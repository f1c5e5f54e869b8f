"""Attention over packed documents.

CPU: our own kernel (float32 and bfloat16). CUDA: torch's variable-length flash kernels (float16 and bfloat16) behind
the same schema, which have not run on hardware yet.
Legend: T tokens, S documents, H heads (Hq a multiple of Hkv), D and Dv head widths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import OpError, autograd, define, once_differentiable

_aten = torch.ops.aten


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """softmax(q k^T * scale) v within each document.

    Args:
        q: [Tq, Hq, D]; k: [Tk, Hkv, D]; v: [Tk, Hkv, Dv], Dv <= D. Query head h reads key head h // (Hq / Hkv).
        cu_q, cu_k: int32 [S+1] document boundaries. They are equal in training; in generation a document's keys may
            be more than its queries, which then are its last tokens. A document without queries is skipped.
        max_q, max_k: the longest document's lengths.
        scale: None is D ** -0.5.

    Returns:
        [Tq, Hq, Dv].

    Raises:
        OpError: shapes or dtypes that do not fit, or (on CPU) a causal document with fewer keys than queries.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.xtuner.attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise OpError(f"attention: {name} must be [tokens, heads, width], got shape {list(x.shape)}")
        if x.dtype != q.dtype:
            raise OpError(f"attention: {name} is {x.dtype}, but q is {q.dtype}")
        if x.numel() and x.stride(-1) != 1:
            raise OpError(f"attention: {name} must be contiguous in its last dim, got strides {list(x.stride())}")
    if k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[2] or v.shape[2] > q.shape[2]:
        raise OpError(f"attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise OpError(f"attention: q has {q.shape[1]} heads, which is no multiple of k's {k.shape[1]}")
    for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape != cu_q.shape or not cu.numel():
            raise OpError(f"attention: {name} must be int32 [documents + 1], got {cu.dtype} {list(cu.shape)}")


def _widen(x: Tensor, width: int) -> Tensor:
    """torch wants v as wide as q; columns of zeros change nothing."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _fake(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _fake_bwd(dout, q, k, v, out, lse, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _attention_cpu(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    out, lse = _fake(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal)
    _C.attention(q, k, v, cu_q, cu_k, scale, causal, out, lse, torch.get_num_threads())
    return out, lse


def _attention_bwd_cpu(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal):
    grads = _fake_bwd(dout, q, k, v, out, lse)
    _C.attention_bwd(dout, q, k, v, out, lse, cu_q, cu_k, scale, causal, *grads, torch.get_num_threads())
    return grads


def _attention_cuda(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    _check(q, k, v, cu_q, cu_k)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise OpError(f"attention: CUDA has kernels for float16 and bfloat16, not {q.dtype}; compute in one of them")
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, _widen(v, q.shape[2]), cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
    )
    return out[..., : v.shape[2]].contiguous(), lse


def _attention_bwd_cuda(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal):
    dout, wide_v, out = (_widen(x, q.shape[2]) for x in (dout, v, out))
    unused = q.new_zeros(2, dtype=torch.uint64)  # random state of a dropout we do not use
    dq, dk, dv = _aten._flash_attention_backward(
        dout, q, k, wide_v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, unused, unused, scale=scale
    )
    return dq, dk, dv[..., : v.shape[2]].contiguous()


def _setup(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, *ctx.scalars = inputs
    ctx.set_materialize_grads(False)  # nobody asks for that of the softmax's sums
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _backward(ctx, grad: Tensor, _grad_lse: None):
    grads = torch.ops.xtuner.attention_bwd(grad.contiguous(), *ctx.saved_tensors, *ctx.scalars)
    return *grads, None, None, None, None, None, None


_BOUNDS = "Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k, float scale, bool causal"
define(
    f"attention(Tensor q, Tensor k, Tensor v, {_BOUNDS}) -> (Tensor, Tensor)",
    _attention_cpu,
    _fake,
    cuda=_attention_cuda,
)
define(
    f"attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_BOUNDS})"
    " -> (Tensor, Tensor, Tensor)",
    _attention_bwd_cpu,
    _fake_bwd,
    cuda=_attention_bwd_cuda,
)
autograd("attention", _backward, _setup)
once_differentiable("attention_bwd")
