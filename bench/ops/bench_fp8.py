"""float8: quantizers against a copy of as many bytes, grouped products against our own bfloat16 and a loop in torch.

Copies read half of the bytes that the quantizer reads and writes, and write the other half, with the same threads.
The loop in torch widens codes, multiplies by the scales and calls torch.mm for each expert.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import Report

from xtuner import _C, ops

QUANTIZED = [(8192, 2048), (4096, 7168)]  # rows, columns
PRODUCTS = [  # experts, rows per expert, K, N: one projection of Qwen3-30B-A3B and one of DeepSeek-V3
    (16, 8, 2048, 1536),
    (8, 32, 2048, 1536),
    (4, 128, 2048, 1536),
    (2, 512, 2048, 1536),
    (2, 128, 7168, 2048),
]


def bench_quantize(report: Report, rows: int, columns: int, dtype) -> None:
    threads, name, shape = torch.get_num_threads(), str(dtype).removeprefix("torch."), f"R{rows} H{columns}"
    x = torch.randn(rows, columns).to(dtype)
    offsets = torch.tensor([0, rows // 5, rows // 2, rows // 2, rows])
    rowcol = ops.quantize_rowcol(x, offsets)
    w = x.view(4, rows // 4, columns)
    blocks = ops.quantize_128x128(w)
    back = torch.empty_like(x)
    rule = (False, 1e-12)
    cases = {
        "quantize_1x128": (1, partial(_C.quantize_1x128, x, None, *rule, *rowcol[:2], threads)),
        "quantize_rowcol": (2, partial(_C.quantize_rowcol, x, offsets, *rule, *rowcol, threads)),
        "quantize_128x128": (2, partial(_C.quantize_128x128, w, *rule, *blocks, threads)),
        "dequantize": (1, partial(_C.dequantize, *rowcol[:2], back, threads)),
    }
    for op, (codes, ours) in cases.items():
        moved = x.numel() * (x.element_size() + codes)
        source, target = torch.ones(moved // 2, dtype=torch.uint8), torch.empty(moved // 2, dtype=torch.uint8)
        report.case(f"{op} {name}", shape, 1e-9 * moved, {"ours": ours, "copy": partial(target.copy_, source)})


def bench_fused(report: Report, tokens: int, columns: int, dtype) -> None:
    """Quantizing on the way against one op after the other; bytes are those that the fused op moves."""
    threads, name = torch.get_num_threads(), str(dtype).removeprefix("torch.")
    x, gates = torch.randn(tokens, columns).to(dtype), torch.randn(4 * tokens, 2 * columns).to(dtype)
    row_of, src = ops.route_map(torch.randint(8, (tokens, 4)), 8)[2:]
    offsets = ops.route_map(torch.randint(8, (4 * tokens, 1)), 8)[1]
    rows = torch.empty(4 * tokens, columns, dtype=dtype)
    outputs, rule = ops.quantize_rowcol(rows.zero_(), offsets), (False, 1e-12)

    def permute_then():
        _C.permute(x, row_of, src, rows, threads)
        _C.quantize_rowcol(rows, offsets, *rule, *outputs, threads)

    def swiglu_then():
        _C.swiglu(gates, offsets, 1.0, None, 0.0, rows, threads)
        _C.quantize_rowcol(rows, offsets, *rule, *outputs, threads)

    permuted = partial(_C.permute_quantize_rowcol, x, src, 4, offsets, *rule, *outputs, threads)
    gated = partial(_C.swiglu_quantize_rowcol, gates, offsets, 1.0, None, 0.0, *rule, *outputs, threads)
    codes, size = 2 * rows.numel(), x.element_size()
    cases = {
        "permute_quantize_rowcol": (permuted, permute_then, codes + rows.numel() * size),
        "swiglu_quantize_rowcol": (gated, swiglu_then, codes + gates.numel() * size),
    }
    for op, (ours, pair, moved) in cases.items():
        calls = {"ours": ours, "one after the other": pair}
        report.case(f"{op} {name}", f"T{tokens} K4 H{columns}", 1e-9 * moved, calls)


def widened(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """In plain torch: one row scale per 128 columns."""
    return (q.float().unflatten(1, (-1, 128)) * scale[:, : q.shape[0]].t().unsqueeze(2)).flatten(1)


def bench_products(report: Report, experts: int, rows: int, k: int, n: int) -> None:
    threads, shape = torch.get_num_threads(), f"E{experts} R/E{rows} K{k} N{n}"
    offsets = torch.arange(experts + 1) * rows
    x, w, g = torch.randn(experts * rows, k), torch.randn(experts, n, k) / k**0.5, torch.randn(experts * rows, n)
    x16, w16, g16 = x.bfloat16(), w.bfloat16(), g.bfloat16()
    (xq, xs, xt, xts), (gq, gs, gt, gts) = ops.quantize_rowcol(x, offsets), ops.quantize_rowcol(g, offsets)
    wq, wt, ws = ops.quantize_128x128(w)
    wts = ws.transpose(1, 2)
    y, dx, dw = torch.empty_like(g16), torch.empty_like(x16), torch.empty(experts, n, k)
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))

    def loop(q, scale, weights, weight_scales, out):
        for e, (i, j) in enumerate(bounds):
            factors = weight_scales[e].repeat_interleave(128, 0).repeat_interleave(128, 1)
            torch.mm(widened(q[i:j], scale[:, i:j]), (weights[e].float() * factors).t()).to(out.dtype)

    def weight_loop():
        for e in range(experts):
            i = e * -(-rows // 128) * 128
            j = i + -(-rows // 128) * 128
            left, right = (
                widened(q[:, i:j], s[i // 128 : j // 128]) for q, s in ((gt, gts), (xt, xts))
            )
            torch.mm(left, right.t(), out=dw[e])

    cases = {
        "forward": (
            partial(_C.gemm_m_grouped_fp8, xq, xs, wq, ws, offsets, y, threads),
            partial(_C.gemm_m_grouped, x16, w16, offsets, True, out=y, num_threads=threads),
            partial(loop, xq, xs, wq, ws, y),
        ),
        "dgrad": (
            partial(_C.gemm_m_grouped_fp8, gq, gs, wt, wts, offsets, dx, threads),
            partial(_C.gemm_m_grouped, g16, w16, offsets, False, out=dx, num_threads=threads),
            partial(loop, gq, gs, wt, wts, dx),
        ),
        "wgrad": (
            partial(_C.gemm_k_grouped_fp8, gt, gts, xt, xts, offsets, 0.0, dw, threads),
            partial(_C.gemm_k_grouped, g16, x16, offsets, 0.0, out=dw, num_threads=threads),
            weight_loop,
        ),
    }
    work = 2e-9 * experts * rows * k * n
    for direction, (ours, in_bf16, in_torch) in cases.items():
        calls = {"ours": ours, "our bfloat16": in_bf16, "dequantize, torch.mm": in_torch}
        report.case(f"float8 {direction}", shape, work, calls)


def main() -> None:
    report = Report("float8", "GB/s or GFLOP/s")
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for rows, columns in QUANTIZED:
            for dtype in (torch.float32, torch.bfloat16):
                bench_quantize(report, rows, columns, dtype)
        for dtype in (torch.float32, torch.bfloat16):
            bench_fused(report, 2048, 2048, dtype)
        for shape in PRODUCTS:
            bench_products(report, *shape)
    report.finish()


if __name__ == "__main__":
    main()
