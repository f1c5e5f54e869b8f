"""Attention over packed documents.

Unlike the other ops this one is torch's own kernels behind our schema: per-document flash attention on CPU, the
variable-length flash kernel on CUDA (which has not run on hardware yet). Legend: S documents, G query heads per
key/value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner.ops._lib import _library, autograd

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
        q: [Tq, Hq, D]; k: [Tk, Hkv, D]; v: [Tk, Hkv, D]. Hq is a multiple of Hkv.
        cu_q, cu_k: int32 [S+1] document boundaries. They are equal in training; in generation a document's keys may
            be more than its queries, which then are its last tokens.
        max_q, max_k: the longest document's lengths.
        scale: None is D ** -0.5.

    Returns:
        [Tq, Hq, D].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.xtuner.attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal)[0]


def _fake(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_bwd(dout, q, k, v, out, lse, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _documents(cu_q: Tensor, cu_k: Tensor):
    """(first, last) of each document's queries and keys, empty documents left out."""
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    spans = zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False)
    return [span for span in spans if span[1] > span[0]]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # [T, H, D] -> [1, H, T, D], no copy


def _mask(tq: int, tk: int, causal: bool, like: Tensor) -> Tensor | None:
    """Additive mask that lets the last query see all keys; None where the kernel's own masking says the same."""
    if not causal or tq in (1, tk):
        return None
    return torch.full((tq, tk), float("-inf"), dtype=like.dtype).triu_(tk - tq + 1)


def _attention_cpu(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    for q0, q1, k0, k1 in _documents(cu_q, cu_k):
        o, l = _aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q[q0:q1]),
            _heads_first(k[k0:k1]),
            _heads_first(v[k0:k1]),
            0.0,
            causal and q1 - q0 == k1 - k0,
            attn_mask=_mask(q1 - q0, k1 - k0, causal, q),
            scale=scale,
        )
        out[q0:q1] = o[0].transpose(0, 1)
        lse[:, q0:q1] = l[0]
    return out, lse


def _attention_bwd_cpu(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal):
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for q0, q1, k0, k1 in _documents(cu_q, cu_k):
        gq, gk, gv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(dout[q0:q1]),
            _heads_first(q[q0:q1]),
            _heads_first(wide_k[k0:k1]),
            _heads_first(wide_v[k0:k1]),
            _heads_first(out[q0:q1]),
            lse[:, q0:q1].unsqueeze(0),
            0.0,
            causal and q1 - q0 == k1 - k0,
            attn_mask=_mask(q1 - q0, k1 - k0, causal, q),
            scale=scale,
        )
        dq[q0:q1] = gq[0].transpose(0, 1)
        dk[k0:k1] = gk[0].transpose(0, 1)
        dv[k0:k1] = gv[0].transpose(0, 1)
    # The heads of one group shared their keys and values.
    return dq, *(g.unflatten(1, (-1, groups)).sum(2) for g in (dk, dv))


def _attention_cuda(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
    )
    return out, lse


def _attention_bwd_cuda(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal):
    unused = q.new_empty(2, dtype=torch.uint64)  # random state of a dropout we do not use
    return _aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, unused, unused, scale=scale
    )


def _setup(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _backward(ctx, grad: Tensor, _grad_lse: Tensor):
    grads = torch.ops.xtuner.attention_bwd(grad.contiguous(), *ctx.saved_tensors, *ctx.scalars)
    return *grads, None, None, None, None, None, None


_BOUNDS = "Tensor cu_q, Tensor cu_k, int max_q, int max_k, float scale, bool causal"
for _schema, _cpu, _cuda, _abstract in (
    (f"attention(Tensor q, Tensor k, Tensor v, {_BOUNDS}) -> (Tensor, Tensor)", _attention_cpu, _attention_cuda, _fake),
    (
        f"attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_BOUNDS})"
        " -> (Tensor, Tensor, Tensor)",
        _attention_bwd_cpu,
        _attention_bwd_cuda,
        _fake_bwd,
    ),
):
    _name = _schema.split("(")[0]
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"xtuner::{_name}", _abstract, lib=_library)
autograd("attention", _backward, _setup)
