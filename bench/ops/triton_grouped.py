"""A plain grouped product in Triton, as a rival: a program per tile, which looks its expert up in the offsets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(a, b, c, offsets, N, K, E, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    tile, col = tl.program_id(1), tl.program_id(0)
    first = 0
    for e in range(E):  # tiles of the experts, one after another
        begin = tl.load(offsets + e)
        end = tl.load(offsets + e + 1)
        tiles = tl.cdiv(end - begin, BM)
        if (tile >= first) & (tile < first + tiles):
            rows = begin + (tile - first) * BM + tl.arange(0, BM)
            cols = col * BN + tl.arange(0, BN)
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for k in range(0, K, BK):
                ks = k + tl.arange(0, BK)
                x = tl.load(a + rows[:, None] * K + ks[None, :], mask=rows[:, None] < end, other=0.0)
                w = tl.load(b + e * N * K + cols[None, :] * K + ks[:, None], mask=cols[None, :] < N, other=0.0)
                acc += tl.dot(x, w)
            mask = (rows[:, None] < end) & (cols[None, :] < N)
            tl.store(c + rows[:, None] * N + cols[None, :], acc.to(tl.bfloat16), mask=mask)
        first += tiles


def gemm_m_grouped(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """a bfloat16 [R, K], b [E, N, K], K a multiple of 64 -> [R, N]."""
    (rows, k), (experts, n, _) = a.shape, b.shape
    out = torch.empty(rows, n, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(n, 128), triton.cdiv(rows, 128) + experts)
    _kernel[grid](a, b, out, offsets, n, k, experts, BM=128, BN=128, BK=64, num_warps=8, num_stages=3)
    return out
