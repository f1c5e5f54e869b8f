"""Grouped GEMM against a loop of torch.mm over the experts (results preallocated) and torch._grouped_mm.

forward: x W^T; dgrad: g W; wgrad: g^T x. Rates count 2 * rows * D * N operations for everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import Report

from xtuner import ops

SHAPES = {  # num_experts, rows, D, N, how rows spread over experts
    torch.float32: [
        (8, 2048, 512, 512, "even"),
        (16, 4096, 512, 512, "even"),
        (32, 8192, 512, 256, "even"),
        (32, 2048, 512, 512, "even"),
        (16, 4096, 512, 512, "zipf"),
        (32, 8192, 512, 512, "zipf"),
        (32, 2048, 256, 512, "zipf"),
    ],
    # torch's bf16 product is so slow on CPUs without AVX-512 that small shapes must do
    torch.bfloat16: [(8, 1024, 512, 256, "even"), (16, 1024, 512, 256, "zipf")],
}


def row_offsets(num_experts: int, rows: int, spread: str) -> torch.Tensor:
    share = torch.ones(num_experts) if spread == "even" else 1 / torch.arange(1, num_experts + 1)
    generator = torch.Generator().manual_seed(0)
    expert = torch.multinomial(share / share.sum(), rows, replacement=True, generator=generator)
    counts = torch.bincount(expert, minlength=num_experts)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def calls_of(direction: str, x, w, g, offsets) -> tuple[Callable, Callable, Callable]:
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    ends = offsets[1:].to(torch.int32)
    if direction == "forward":
        out = torch.empty_like(g)
        loop = [(x[b:e], w[i].t(), out[b:e]) for i, (b, e) in enumerate(bounds)]
        ours = partial(ops.gemm_m_grouped, x, w, offsets)
        grouped = partial(torch._grouped_mm, x, w.transpose(1, 2), offs=ends)
    elif direction == "dgrad":
        out = torch.empty_like(x)
        loop = [(g[b:e], w[i], out[b:e]) for i, (b, e) in enumerate(bounds)]
        ours = partial(ops.gemm_m_grouped, g, w, offsets, False)
        grouped = partial(torch._grouped_mm, g, w, offs=ends)
    else:
        out = torch.empty_like(w)
        loop = [(g[b:e].t(), x[b:e], out[i]) for i, (b, e) in enumerate(bounds)]
        ours = partial(ops.gemm_k_grouped, g, x, offsets)
        grouped = partial(torch._grouped_mm, g.t(), x, offs=ends)

    def mm_loop():
        for a, b, c in loop:
            torch.mm(a, b, out=c)

    torch.testing.assert_close(ours(), grouped(), rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-1)
    return ours, mm_loop, grouped


def main() -> None:
    report = Report("grouped GEMM", "GFLOP/s")
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        for dtype, shapes in SHAPES.items():
            for num_experts, rows, d, n, spread in shapes:
                offsets = row_offsets(num_experts, rows, spread)
                generator = torch.Generator().manual_seed(1)
                sizes = ((rows, d), (num_experts, n, d), (rows, n))
                x, w, g = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
                for direction in ("forward", "dgrad", "wgrad"):
                    ours, mm_loop, grouped = calls_of(direction, x, w, g, offsets)
                    report.case(
                        f"{direction} {str(dtype).removeprefix('torch.')}",
                        f"E{num_experts} R{rows} D{d} N{n} {spread}",
                        2e-9 * rows * d * n,
                        {"ours": ours, "torch.mm loop": mm_loop, "torch._grouped_mm": grouped},
                    )
    report.finish()


if __name__ == "__main__":
    main()
