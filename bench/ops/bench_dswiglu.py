"""Experts as one op against the separate ones: backward through w2 and SwiGLU, and all of forward and backward.

"with activation kept" is what `gemm_m_grouped_dswiglu` does without its last output, which the separate ops need not
compute as they keep it from forward.
"""

from __future__ import annotations

from functools import partial

import torch
from shapes import row_offsets
from timing import Report

from xtuner import ops

SHAPES = {"Qwen3-30B-A3B": (8, 2048, 768), "step of bench/e2e.py": (32, 512, 256)}  # E, D, I


def by_steps(dy, b, offsets, x, recompute: bool):
    g = ops.gemm_m_grouped(dy, b, offsets, False)
    dx = torch.ops.xtuner.swiglu_bwd(g, x, offsets, 1.0, None, 0.0)
    return (dx, ops.swiglu(x, offsets)) if recompute else dx


def separate_mlp(x, w13, w2, offsets):
    return ops.gemm_m_grouped(ops.gemm_m_grouped_swiglu(x, w13, offsets), w2, offsets)


def both_ways(mlp, grad, *inputs) -> None:
    torch.autograd.grad(mlp(*inputs), inputs[:3], grad)


def main() -> None:
    report = Report("experts as one op", "GFLOP/s")
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            for model, (experts, d, width) in SHAPES.items():
                offsets = row_offsets(experts, 256, "zipf1.2")
                rows = int(offsets[-1])
                dy, x, gate_up = (torch.randn(rows, n).to(dtype) for n in (d, d, 2 * width))
                w13, w2 = (torch.randn(experts, *s).to(dtype) / d**0.5 for s in ((2 * width, d), (d, width)))
                calls = {
                    "ours": partial(ops.gemm_m_grouped_dswiglu, dy, w2, offsets, gate_up),
                    "separate ops": partial(by_steps, dy, w2, offsets, gate_up, True),
                    "with activation kept": partial(by_steps, dy, w2, offsets, gate_up, False),
                }
                shape = f"{model} E{experts} R{rows}"
                report.case(f"dswiglu {name}", shape, 2e-9 * rows * d * width, calls)
                inputs = [t.requires_grad_() for t in (x, w13, w2)]
                calls = {
                    "ours": partial(both_ways, ops.grouped_mlp, dy, *inputs, offsets),
                    "separate ops": partial(both_ways, separate_mlp, dy, *inputs, offsets),
                }
                report.case(f"experts {name}", shape, 18e-9 * rows * d * width, calls)
    report.finish()


if __name__ == "__main__":
    main()
