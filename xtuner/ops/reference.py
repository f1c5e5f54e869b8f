"""Plain-torch oracles: what each op means, with no thought of speed. Differentiable by autograd where the op is.

Same arguments and results as the ops of the same names; any floating dtype, so tests can run them in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def topk_softmax(logits: Tensor, num_experts_per_tok: int, normalise: bool, choice_bias=None, topk_idx=None):
    """weights, idx, counts, prob_sum, z_sum, entropy_sum."""
    probs = logits.softmax(-1)
    if topk_idx is None:
        scores = probs.detach() if choice_bias is None else probs.detach() + choice_bias
        topk_idx = scores.sort(dim=-1, descending=True, stable=True).indices[:, :num_experts_per_tok]
    topk_idx = topk_idx.long()
    weights = probs.gather(1, topk_idx)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    counts = F.one_hot(topk_idx.flatten(), logits.shape[1]).sum(0).to(logits.dtype)
    entropy = -torch.xlogy(probs, probs).sum()
    return weights, topk_idx, counts, probs.sum(0), logits.logsumexp(-1).square().sum(), entropy.detach()


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


def ep_dispatch(x: list[Tensor], topk_idx: list[Tensor], num_experts: int) -> list[Tensor]:
    """The ep ops over the tensors of all ranks at once: one rank with all tokens and experts, its rows split."""
    _, offsets, row_of, src = route_map(torch.cat(topk_idx), num_experts)
    bounds = offsets[:: num_experts // len(x)]
    return list(permute(torch.cat(x), row_of, src)[: bounds[-1]].split(bounds.diff().tolist()))


def ep_combine(y: list[Tensor], topk_idx: list[Tensor], num_experts: int, probs: list[Tensor] | None = None):
    _, _, row_of, src = route_map(torch.cat(topk_idx), num_experts)
    out = unpermute(torch.cat(y), row_of, src, None if probs is None else torch.cat(probs))
    return list(out.split([len(idx) for idx in topk_idx]))


def gemm_m_grouped(a, b, offsets, trans_b: bool = True, bias=None, maps=None) -> Tensor:
    bounds = offsets.tolist()
    if maps is not None:
        a = permute(a, *maps)
    parts = []
    for e, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = a[first:last] @ (b[e].T if trans_b else b[e])
        parts.append(part if bias is None else part + bias[e])
    columns = b.shape[1] if trans_b else b.shape[2]
    return torch.cat([*parts, a.new_zeros(a.shape[0] - bounds[-1], columns)])


def gemm_m_grouped_swiglu(a, b, offsets, bias=None, maps=None, alpha=1.0, limit=None, up_offset=0.0) -> Tensor:
    return swiglu(gemm_m_grouped(a, b, offsets, True, bias, maps), offsets, alpha, limit, up_offset)


def gemm_m_grouped_dswiglu(dy, b, offsets, x, weights=None, alpha=1.0, limit=None, up_offset=0.0):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        act = swiglu(x, offsets, alpha, limit, up_offset)
        used = torch.arange(len(x)) < int(offsets[-1])
        w = used.to(x.dtype) if weights is None else torch.where(used, weights.to(x.dtype), 0.0)
        g = gemm_m_grouped(dy.to(x.dtype), b, offsets, False)
        (dx,) = torch.autograd.grad(act, x, w[:, None] * g)
    act = act.detach()
    dweights = x.new_empty(0) if weights is None else (g * act).sum(1)
    return torch.where(used[:, None], dx, 0.0), w[:, None] * act, dweights


def grouped_mlp(x, w13, w2, offsets, maps=None) -> Tensor:
    return gemm_m_grouped(gemm_m_grouped_swiglu(x, w13, offsets, maps=maps), w2, offsets)


def gemm_k_grouped(a, b, offsets, out_dtype: torch.dtype | None = None, maps=None) -> Tensor:
    bounds = offsets.tolist()
    if maps is not None:
        b = permute(b, *maps)
    products = [a[i:j].T @ b[i:j] for i, j in zip(bounds, bounds[1:], strict=False)]
    return torch.stack(products).to(out_dtype or a.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x @ weight.T
    return out if bias is None else out + bias


def linear_qkv(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ wq.T, x @ wk.T, x @ wv.T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return rotary(rms_norm(x, weight, eps), cos, sin)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    log_probs = (hidden @ weight.T).log_softmax(-1)
    return -(loss_weights * log_probs[torch.arange(len(labels)), labels]).sum()


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


def _quantize_blocks(x: Tensor, dims: tuple[int, ...], dtype, power_of_two: bool, eps: float) -> tuple[Tensor, Tensor]:
    """x with one scale for all of its values along `dims`, all in float32; the scale keeps these dims, of size 1."""
    x = x.float()
    scale = x.abs().amax(dims, keepdim=True).clamp_min(eps) / torch.finfo(dtype).max
    if power_of_two:
        scale = torch.where(scale.isfinite(), torch.exp2(torch.log2(scale.double()).ceil()).float(), scale)
    return torch.where(scale.isfinite(), x * (1 / scale), torch.nan).to(dtype), scale


def quantize_1x128(x, offsets=None, dtype=torch.float8_e4m3fn, power_of_two=False, eps=1e-12):
    rows, used = x.shape[0], x.shape[0] if offsets is None else int(offsets[-1])
    q, scale = _quantize_blocks(x[:used].unflatten(1, (-1, 128)), (2,), dtype, power_of_two, eps)
    q = F.pad(q.flatten(1).view(torch.uint8), (0, 0, 0, rows - used)).view(dtype)
    return q, F.pad(scale[..., 0].t(), (0, (rows + 3) // 4 * 4 - used)).contiguous()


def quantize_128x128(w, dtype=torch.float8_e4m3fn, power_of_two=False, eps=1e-12):
    blocks = w.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    q, scale = _quantize_blocks(blocks, (2, 4), dtype, power_of_two, eps)
    q = q.flatten(3).flatten(1, 2)
    return q, q.transpose(1, 2).contiguous(), scale[:, :, 0, :, 0].contiguous()


def pad_experts(x: Tensor, offsets: Tensor) -> Tensor:
    """Rows [P, H] with every expert's padded to a multiple of 128 and zeros wherever there is none."""
    bounds = offsets.tolist()
    parts = [F.pad(x[i:j], (0, 0, 0, -(j - i) % 128)) for i, j in zip(bounds, bounds[1:], strict=False)]
    padded = torch.cat([x[:0], *parts])
    return F.pad(padded, (0, 0, 0, (x.shape[0] + 127 * len(parts)) // 128 * 128 - padded.shape[0]))


def quantize_rowcol(x, offsets, dtype=torch.float8_e4m3fn, power_of_two=False, eps=1e-12):
    qt, scale_t = quantize_1x128(pad_experts(x, offsets).t(), None, dtype, power_of_two, eps)
    is_row = pad_experts(torch.ones(x.shape[0], 1), offsets)[:, 0].bool()
    qt.view(torch.uint8)[:, ~is_row] = 0
    scale_t[~is_row.view(-1, 128).any(1)] = 0
    return *quantize_1x128(x, offsets, dtype, power_of_two, eps), qt, scale_t


def permute_quantize_rowcol(x, maps, offsets, dtype=torch.float8_e4m3fn, power_of_two=False, eps=1e-12):
    return quantize_rowcol(permute(x, *maps), offsets, dtype, power_of_two, eps)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    x = q.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if q.ndim == 3:
        return (x * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)).to(dtype)
    return (x * scale[:, : q.shape[0]].t().repeat_interleave(128, 1)).to(dtype)


def gemm_m_grouped_fp8(a, scale_a, b, scale_b, offsets, out_dtype=torch.bfloat16) -> Tensor:
    exact = dequantize(a, scale_a, torch.float64), dequantize(b, scale_b, torch.float64)
    exact[0][int(offsets[-1]) :] = 0
    return gemm_m_grouped(*exact, offsets).to(out_dtype)


def gemm_k_grouped_fp8(a, scale_a, b, scale_b, offsets, out_dtype=torch.float32) -> Tensor:
    blocks = (offsets.diff() + 127) // 128
    padded = torch.cat([offsets[:1], (blocks * 128).cumsum(0)])
    left, right = (dequantize(x, s, torch.float64).t() for x, s in ((a, scale_a), (b, scale_b)))
    return gemm_k_grouped(left, right, padded, out_dtype)


def chunked_loss(hidden: Tensor, head_weight: Tensor, labels: Tensor, per_token_fn, extras) -> Tensor:
    log_probs = (hidden @ head_weight.T).log_softmax(-1)
    return per_token_fn(log_probs.gather(1, labels[:, None])[:, 0], extras).sum()
