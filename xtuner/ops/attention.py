"""Attention over packed documents.

Unlike the other ops this one is torch's own kernels behind our schema. CPU: torch has no variable-length kernel there,
so each document goes through its blocked (flash) kernel; a run of documents of equal length is one call. CUDA: torch's
variable-length flash kernels (float16 and bfloat16), which have not run on hardware yet.
Legend: T tokens, S documents, H heads (Hq a multiple of Hkv), D and Dv head widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xtuner.ops._lib import OpError, _library, autograd, once_differentiable

_aten = torch.ops.aten
_flash_cpu = _aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_bwd = _aten._scaled_dot_product_flash_attention_for_cpu_backward


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


class _Run(NamedTuple):
    """`count` consecutive documents of `len_q` queries and `len_k` keys each, beginning at `start_q` and `start_k`."""

    start_q: int
    start_k: int
    len_q: int
    len_k: int
    count: int

    def queries(self, x_THD: Tensor) -> Tensor:
        """This run's rows as a view [count, H, len_q, D], which is how torch wants them."""
        return _documents(x_THD, self.start_q, self.count, self.len_q)

    def keys(self, x_THD: Tensor) -> Tensor:
        return _documents(x_THD, self.start_k, self.count, self.len_k)

    def masking(self, causal: bool, like: Tensor) -> dict[str, bool | Tensor | None]:
        """The kernel's own causal mask lets the first query see the first key; ours the last query the last key."""
        if not causal or self.len_q == 1:
            return {"is_causal": False, "attn_mask": None}
        if self.len_q == self.len_k:
            return {"is_causal": True, "attn_mask": None}
        mask = torch.full((self.len_q, self.len_k), float("-inf"), dtype=like.dtype)
        return {"is_causal": False, "attn_mask": mask.triu_(self.len_k - self.len_q + 1)}


def _documents(x_THD: Tensor, start: int, count: int, length: int) -> Tensor:
    return x_THD.narrow(0, start, count * length).unflatten(0, (count, length)).transpose(1, 2)


def _runs(cu_q: Tensor, cu_k: Tensor, num_q: int, num_k: int, causal: bool) -> Iterator[_Run]:
    """The documents that have queries and keys, as runs of equal lengths."""
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for name, bounds, total in (("cu_q", bounds_q, num_q), ("cu_k", bounds_k, num_k)):
        if bounds[0] != 0 or bounds[-1] != total:
            raise OpError(f"attention: {name} must go from 0 to {total}, but goes from {bounds[0]} to {bounds[-1]}")
    run = _Run(0, 0, 0, 0, 0)
    for s, (q0, q1, k0, k1) in enumerate(zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False)):
        len_q, len_k = q1 - q0, k1 - k0
        if len_q < 0 or len_k < 0:
            raise OpError(f"attention: document {s} has {len_q} queries and {len_k} keys; boundaries must not decrease")
        if causal and len_q > len_k:
            raise OpError(f"attention: document {s} has {len_q} queries but {len_k} keys; causal needs as many")
        if (run.len_q, run.len_k) == (len_q, len_k):
            run = run._replace(count=run.count + 1)
            continue
        if run.len_q and run.len_k:
            yield run
        run = _Run(q0, k0, len_q, len_k, 1)
    if run.len_q and run.len_k:
        yield run


def _widen(x: Tensor, width: int) -> Tensor:
    """torch wants v as wide as q; columns of zeros change nothing."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _fake(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


def _fake_bwd(dout, q, k, v, out, lse, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _attention_cpu(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    _check(q, k, v, cu_q, cu_k)
    out, lse = _fake(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal)
    out.zero_(), lse.fill_(float("-inf"))  # what a document without keys gets
    wide_v, lse_THD = _widen(v, q.shape[2]), lse.t().unsqueeze(-1)
    for run in _runs(cu_q, cu_k, q.shape[0], k.shape[0], causal):
        run_out, run_lse = _flash_cpu(
            run.queries(q), run.keys(k), run.keys(wide_v), **run.masking(causal, q), scale=scale
        )
        run.queries(out).copy_(run_out[..., : v.shape[2]])
        run.queries(lse_THD).copy_(run_lse.unsqueeze(-1))
    return out, lse


def _attention_bwd_cpu(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal):
    grads = _fake_bwd(dout, q, k, v, out, lse)
    for grad in grads:
        grad.zero_()  # of documents that have no queries, or no keys
    dq, dk, dv = grads
    width, lse_THD = q.shape[2], lse.t().unsqueeze(-1)
    dout, wide_v, out = (_widen(x, width) for x in (dout, v, out))
    for run in _runs(cu_q, cu_k, q.shape[0], k.shape[0], causal):
        run_dq, run_dk, run_dv = _flash_cpu_bwd(
            *(run.queries(dout), run.queries(q), run.keys(k), run.keys(wide_v), run.queries(out)),
            run.queries(lse_THD).squeeze(-1),
            dropout_p=0.0,
            **run.masking(causal, q),
            scale=scale,
        )
        run.queries(dq).copy_(run_dq)
        run.keys(dk).copy_(run_dk)
        run.keys(dv).copy_(run_dv[..., : v.shape[2]])
    return dq, dk, dv


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
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _backward(ctx, grad: Tensor, _grad_lse: Tensor):
    grads = torch.ops.xtuner.attention_bwd(grad.contiguous(), *ctx.saved_tensors, *ctx.scalars)
    return *grads, None, None, None, None, None, None


_BOUNDS = "Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k, float scale, bool causal"
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
once_differentiable("attention_bwd")
