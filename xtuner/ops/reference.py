"""Plain-torch oracles: what each op means, with no thought of speed. Differentiable by autograd where the op is.

Same arguments and results as the ops of the same names; any floating dtype, so tests can run them in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route_map(topk_idx: Tensor, num_experts: int, capacity: int | None = None, align: int = 1):
    tokens, k = topk_idx.shape
    capacity = tokens * k + num_experts * (align - 1) if capacity is None else capacity
    flat = topk_idx.flatten().tolist()
    counts = [flat.count(e) for e in range(num_experts)]
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + (count + align - 1) // align * align)
    row_of, src, filled = [-1] * len(flat), [-1] * capacity, list(offsets)
    for choice, expert in enumerate(flat):
        if expert >= 0:
            row_of[choice] = filled[expert]
            src[filled[expert]] = choice
            filled[expert] += 1
    return (
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int64),
        torch.tensor(row_of, dtype=torch.int32).view(tokens, k),
        torch.tensor(src, dtype=torch.int32),
    )


def permute(x: Tensor, row_of: Tensor, src: Tensor) -> Tensor:
    if not x.shape[0]:
        return torch.cat([x, x.new_zeros(src.shape[0], x.shape[1])])
    rows = x[(src.clamp_min(0) // max(1, row_of.shape[1])).long()]
    return torch.where((src >= 0)[:, None], rows, torch.zeros_like(rows))


def unpermute(y: Tensor, row_of: Tensor, src: Tensor, probs: Tensor | None = None) -> Tensor:
    out = y.new_zeros(row_of.shape[0], y.shape[1])
    for k in range(row_of.shape[1]):
        kept = row_of[:, k] >= 0
        rows = y[row_of[kept, k].long()]
        if probs is not None:
            rows = rows * probs[kept, k, None].to(y.dtype)
        out = out.index_add(0, kept.nonzero()[:, 0], rows)
    return out


def gemm_m_grouped(a: Tensor, b: Tensor, offsets: Tensor, trans_b: bool = True) -> Tensor:
    bounds = offsets.tolist()
    parts = [
        a[first:last] @ (w.T if trans_b else w) for first, last, w in zip(bounds, bounds[1:], b, strict=False)
    ]
    columns = b.shape[1] if trans_b else b.shape[2]
    return torch.cat([*parts, a.new_zeros(a.shape[0] - bounds[-1], columns)])


def gemm_k_grouped(a: Tensor, b: Tensor, offsets: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    bounds = offsets.tolist()
    products = [a[i:j].T @ b[i:j] for i, j in zip(bounds, bounds[1:], strict=False)]
    return torch.stack(products).to(out_dtype or a.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x @ weight.T
    return out if bias is None else out + bias


def swiglu(
    x: Tensor, offsets: Tensor | None = None, alpha: float = 1.0, limit: float | None = None, up_offset: float = 0.0
) -> Tensor:
    used = x.shape[0] if offsets is None else int(offsets[-1])
    gate, up = x[:used].chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = gate * torch.sigmoid(alpha * gate) * (up + up_offset)
    return torch.cat([y, x.new_zeros(x.shape[0] - used, y.shape[1])])


def attention(q, k, v, cu_q, cu_k, max_q, max_k, scale=None, causal=True) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    bounds_q, bounds_k, parts = cu_q.tolist(), cu_k.tolist(), []
    for s in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[s], bounds_q[s + 1]), slice(bounds_k[s], bounds_k[s + 1])
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
        if causal:
            tq, tk = scores.shape[1:]
            scores = scores.masked_fill(torch.ones(tq, tk, dtype=torch.bool).triu(tk - tq + 1), float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys]))
    return torch.cat(parts)
