"""Grouped GEMM against a loop of torch.mm over the experts (into given memory) and torch._grouped_mm (both allocate).

forward: x W^T; dgrad: g W; wgrad: g^T x. Rates count 2 * rows * D * N operations for everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from timing import Report

from xtuner import _C, ops

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


class Calls(NamedTuple):
    ours_out: Callable  # into given memory, like the loop
    mm_loop: Callable
    ours: Callable  # allocates its result, like torch._grouped_mm
    grouped: Callable


def calls_of(direction: str, x, w, g, offsets) -> Calls:
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    ends, threads = offsets[1:].to(torch.int32), torch.get_num_threads()
    if direction == "forward":
        out = torch.empty_like(g)
        loop = [(x[b:e], w[i].t(), out[b:e]) for i, (b, e) in enumerate(bounds)]
        ours_out = partial(_C.gemm_m_grouped, x, w, offsets, True, out, threads)
        ours = partial(ops.gemm_m_grouped, x, w, offsets)
        grouped = partial(torch._grouped_mm, x, w.transpose(1, 2), offs=ends)
    elif direction == "dgrad":
        out = torch.empty_like(x)
        loop = [(g[b:e], w[i], out[b:e]) for i, (b, e) in enumerate(bounds)]
        ours_out = partial(_C.gemm_m_grouped, g, w, offsets, False, out, threads)
        ours = partial(ops.gemm_m_grouped, g, w, offsets, False)
        grouped = partial(torch._grouped_mm, g, w, offs=ends)
    else:
        out = torch.empty_like(w)
        loop = [(g[b:e].t(), x[b:e], out[i]) for i, (b, e) in enumerate(bounds)]
        ours_out = partial(_C.gemm_k_grouped, g, x, offsets, 0.0, out, threads)
        ours = partial(ops.gemm_k_grouped, g, x, offsets)
        grouped = partial(torch._grouped_mm, g.t(), x, offs=ends)

    def mm_loop():
        for a, b, c in loop:
            torch.mm(a, b, out=c)

    torch.testing.assert_close(ours(), grouped(), rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-1)
    return Calls(ours_out, mm_loop, ours, grouped)


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
                    calls = calls_of(direction, x, w, g, offsets)
                    name, shape = str(dtype).removeprefix("torch."), f"E{num_experts} R{rows} D{d} N{n} {spread}"
                    work = 2e-9 * rows * d * n
                    given = {"ours": calls.ours_out, "torch.mm loop": calls.mm_loop}
                    report.case(f"{direction} {name} into out", shape, work, given)
                    allocating = {"ours": calls.ours, "torch._grouped_mm": calls.grouped}
                    report.case(f"{direction} {name}", shape, work, allocating)
    report.finish()


if __name__ == "__main__":
    main()
