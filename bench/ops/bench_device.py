"""The ops on a GPU: rates of what moves rows against a copy of as many bytes, grouped products against cuBLAS on one
dense product of the same size, torch._grouped_mm and a grouped product in Triton, all in one process.

Rates count the bytes that must be read and written at least once, and 2 M N K operations per product. Products multiply
random numbers: zeros draw less power and run faster. With --device cpu, small shapes show that the script works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from device_layer import bench_layer
from device_timing import Clock, machine

from xtuner import ops

MOVED = [(8192, 8, 128, 2048), (4096, 8, 256, 7168)]  # tokens, choices, experts, hidden: Qwen3-30B-A3B, DeepSeek-V3
PRODUCTS = [  # experts, rows of all, N, K
    (128, 65536, 1536, 2048),
    (128, 65536, 2048, 768),
    (8, 32768, 4096, 7168),
    (256, 262144, 4096, 6144),
]
LAYER = (8192, 8, 128, 2048, 768)  # Qwen3-30B-A3B
# What an H200 should reach: rates, and how much faster than another.
LARGE, DEEPSEEK = "E256 R262144 N4096 K6144", "E8 R32768 N4096 K7168"
TARGETS = {
    ("gemm_m_grouped", LARGE): {"ours": 670, "over grouped_mm": 1.08},
    ("gemm_k_grouped", LARGE): {"ours": 600},
    ("gemm_m_grouped_fp8", DEEPSEEK): {"ours": 1250},
    ("gemm_k_grouped_fp8", DEEPSEEK): {"ours": 870},
    ("moe_layer", None): {"ours": 420, "ours_fp8 over ours": 1.4},
    ("moe_layer_bwd", None): {"ours": 400, "ours_fp8 over ours": 1.4},
    ("permute", None): {"ours": 2800},
    ("unpermute", None): {"ours": 3200},
    ("quantize_1x128", None): {"over copy": 0.75},
    ("quantize_rowcol", None): {"over copy": 0.75},
    ("quantize_128x128", None): {"over copy": 0.75},
}
SMALL_MOVED, SMALL_PRODUCTS, SMALL_LAYER = [(64, 2, 4, 256)], [(4, 64, 256, 128)], (64, 2, 4, 256, 128)


class Report:
    def __init__(self, clock: Clock):
        self.clock, self.rows, self.missing = clock, [], {}

    def case(self, op: str, shape: str, work: float, unit: str, calls: dict[str, Callable]) -> None:
        """`calls` begins with ours; one that has no kernel here is listed, and what is left is measured."""
        for name, call in list(calls.items()):
            try:
                call()
            except (ValueError, RuntimeError, NotImplementedError) as error:
                self.missing[f"{op} {shape}: {name}"] = str(error).splitlines()[0]
                del calls[name]
        if not calls:
            return
        seconds = self.clock.medians(calls)
        ratios = {
            f"over {n}": round(t / seconds["ours"], 3) for n, t in seconds.items() if "ours" in seconds and n != "ours"
        }
        if {"ours", "ours_fp8"} <= seconds.keys():
            ratios["ours_fp8 over ours"] = round(seconds["ours"] / seconds["ours_fp8"], 3)
        rates = {name: round(work / t, 2) for name, t in seconds.items()}
        print(f"{op:20s} {shape:34s} " + "  ".join(f"{n} {r:.1f} {unit}" for n, r in rates.items()), ratios, flush=True)
        microseconds = {name: round(t * 1e6, 2) for name, t in seconds.items()}
        row = {"op": op, "shape": shape, "unit": unit, "us": microseconds, "rate": rates, "speedup": ratios}
        targets = TARGETS.get((op, shape), TARGETS.get((op, None), {}))
        if targets and self.clock.device.type == "cuda":
            row["targets"] = verdicts(targets, rates | ratios)
            print(" " * 21 + "targets for an H200: " + "; ".join(row["targets"].values()), flush=True)
        self.rows.append(row)


def verdicts(targets: dict[str, float], figures: dict[str, float]) -> dict[str, str]:
    """Each figure beside its target."""
    said = {}
    for name, target in targets.items():
        if name in figures:
            said[name] = f"{name} {figures[name]:g} of {target:g}, {'met' if figures[name] >= target else 'missed'}"
        else:
            said[name] = f"{name} not measured of {target:g}"
    return said


def bench_moved(report: Report, device: torch.device, tokens: int, k: int, experts: int, hidden: int) -> None:
    shape = f"T{tokens} K{k} E{experts} H{hidden}"
    topk_idx = torch.rand(tokens, experts, device=device).topk(k).indices.int()
    rows, size = tokens * k, 2 * tokens * hidden
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    y, gate_up = (
        torch.randn(rows, hidden, device=device, dtype=torch.bfloat16),
        torch.randn(rows, 1536, device=device, dtype=torch.bfloat16),
    )
    probs = torch.rand(tokens, k, device=device)
    _, offsets, row_of, src = ops.route_map(topk_idx, experts, rows)
    w = torch.randn(8, hidden, 2048 if hidden % 128 == 0 else 128, device=device, dtype=torch.bfloat16)

    def case(op: str, moved: float, call: Callable) -> None:
        source = torch.ones(int(moved) // 2, dtype=torch.uint8, device=device)
        copy = partial(torch.empty_like(source).copy_, source)
        report.case(op, shape, moved * 1e-9, "GB/s", {"ours": call, "copy": copy})

    case("route_map", rows * 12, partial(ops.route_map, topk_idx, experts, rows))
    case("permute", size * (1 + k), partial(ops.permute, x, row_of, src))
    case("unpermute", size * (1 + k), partial(ops.unpermute, y, row_of, src, probs))
    case("unpermute_bwd", size * (1 + 2 * k), partial(torch.ops.xtuner.unpermute_bwd, x, y, row_of, src, probs))
    case("swiglu", rows * 768 * 6, partial(ops.swiglu, gate_up, offsets))
    bwd = partial(torch.ops.xtuner.swiglu_bwd, gate_up[:, :768].contiguous(), gate_up, offsets, 1.0, None, 0.0)
    case("swiglu_bwd", rows * 768 * 10, bwd)
    case("quantize_1x128", y.numel() * 3, partial(ops.quantize_1x128, y, offsets))
    case("quantize_rowcol", y.numel() * 4, partial(ops.quantize_rowcol, y, offsets))
    gather = partial(ops.permute_quantize_rowcol, x, (row_of, src), offsets)
    case("permute_quantize_rowcol", size + 2 * rows * hidden, gather)
    case("swiglu_quantize_rowcol", rows * 768 * 6, partial(ops.swiglu_quantize_rowcol, gate_up, offsets))
    case("quantize_128x128", w.numel() * 4, partial(ops.quantize_128x128, w))
    case("dequantize", y.numel() * 3, partial(ops.dequantize, *ops.quantize_1x128(y), torch.bfloat16))


def _operands(device: torch.device, experts: int, rows: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Random loads of experts, as ends and as offsets; in bfloat16 x [rows, k], w [experts, n, k], g [rows, n]."""
    idx = torch.randint(experts, (rows,), device=device)
    ends = torch.bincount(idx, minlength=experts).cumsum(0)
    x, w, g = (
        torch.randn(*size, device=device, dtype=torch.bfloat16) for size in ((rows, k), (experts, n, k), (rows, n))
    )
    return ends, torch.cat([ends.new_zeros(1), ends]), x, w, g


def bench_products(report: Report, device: torch.device, experts: int, rows: int, n: int, k: int) -> None:
    shape, flop = f"E{experts} R{rows} N{n} K{k}", 2e-12 * rows * n * k
    ends, offsets, x, w, g = _operands(device, experts, rows, n, k)
    dense, out = w[0].t(), torch.empty(rows, n, device=device, dtype=torch.bfloat16)
    calls = {"ours": partial(ops.gemm_m_grouped, x, w, offsets)}
    if importlib.util.find_spec("triton") and device.type == "cuda":
        import triton_grouped

        calls["triton"] = partial(triton_grouped.gemm_m_grouped, x, w, offsets)
    calls["grouped_mm"] = partial(torch._grouped_mm, x, w.transpose(1, 2), offs=ends.int())
    calls["cublas_dense"] = partial(torch.mm, x, dense, out=out)
    report.case("gemm_m_grouped", shape, flop, "TFLOP/s", calls)
    calls = {"ours": partial(ops.gemm_k_grouped, g, x, offsets)}
    calls["grouped_mm"] = partial(torch._grouped_mm, g.t(), x, offs=ends.int())
    calls["cublas_dense"] = lambda: torch.mm(g.t(), x)
    report.case("gemm_k_grouped", shape, flop, "TFLOP/s", calls)
    bench_dswiglu(report, shape, flop, x, w.transpose(1, 2).contiguous(), offsets)


def bench_fp8_products(report: Report, device: torch.device, experts: int, rows: int, n: int, k: int) -> None:
    """Float8 against our bfloat16 kernels, alone and with the quantization of activations (weights are quantized once
    per optimizer step), and against torch: its grouped product has one scale per row, its dense one scales as ours."""
    shape, flop = f"E{experts} R{rows} N{n} K{k}", 2e-12 * rows * n * k
    ends, offsets, x, w, g = _operands(device, experts, rows, n, k)
    (xq, xs), (wq, _, ws) = ops.quantize_1x128(x, offsets), ops.quantize_128x128(w)

    def quantize_and_multiply() -> None:
        ops.gemm_m_grouped_fp8(*ops.quantize_1x128(x, offsets), wq, ws, offsets)

    bf16 = partial(ops.gemm_m_grouped, x, w, offsets)
    row_scales = torch.ones(rows, device=device), torch.ones(experts, n, device=device)
    calls = {"ours": partial(ops.gemm_m_grouped_fp8, xq, xs, wq, ws, offsets), "our_bf16": bf16}
    calls["scaled_grouped_mm"] = partial(
        torch._scaled_grouped_mm, xq, wq.transpose(1, 2), *row_scales, offs=ends.int(), out_dtype=torch.bfloat16
    )
    calls["scaled_mm_dense"] = partial(
        torch._scaled_mm, xq, wq[0].t(), scale_a=xs[:, :rows].t(), scale_b=ws[0].t(), out_dtype=torch.bfloat16
    )
    report.case("gemm_m_grouped_fp8", shape, flop, "TFLOP/s", calls)
    report.case("m_grouped, quantized", shape, flop, "TFLOP/s", {"ours": quantize_and_multiply, "our_bf16": bf16})

    _, _, xt, xts = ops.quantize_rowcol(x, offsets)
    _, _, gt, gts = ops.quantize_rowcol(g, offsets)

    def quantize_and_multiply_k() -> None:
        left, right = ops.quantize_rowcol(g, offsets)[2:], ops.quantize_rowcol(x, offsets)[2:]
        ops.gemm_k_grouped_fp8(*left, *right, offsets)

    bf16 = partial(ops.gemm_k_grouped, g, x, offsets, out_dtype=torch.float32)
    ours = partial(ops.gemm_k_grouped_fp8, gt, gts, xt, xts, offsets)
    report.case("gemm_k_grouped_fp8", shape, flop, "TFLOP/s", {"ours": ours, "our_bf16": bf16})
    report.case("k_grouped, quantized", shape, flop, "TFLOP/s", {"ours": quantize_and_multiply_k, "our_bf16": bf16})


def bench_dswiglu(report: Report, shape: str, flop: float, dy, b, offsets) -> None:
    """SwiGLU's backward behind the data gradient dy b[e], I = N, D = K, against the ops that do it step by step."""
    gate_up = torch.randn(dy.shape[0], 2 * b.shape[2], device=dy.device, dtype=dy.dtype)
    weights, scalars = torch.rand(dy.shape[0], device=dy.device), (1.0, None, 0.0)

    def separate() -> None:
        g = ops.gemm_m_grouped(dy, b, offsets, False)
        torch.ops.xtuner.swiglu_bwd(g, gate_up, offsets, *scalars)
        ops.swiglu(gate_up, offsets, *scalars)

    ours, product = partial(ops.gemm_m_grouped_dswiglu, dy, b, offsets, gate_up), ops.gemm_m_grouped
    calls = {"ours": ours, "separate": separate, "our_product": partial(product, dy, b, offsets, False)}
    report.case("gemm_m_grouped_dswiglu", shape, flop, "TFLOP/s", calls)
    with_weights = {"ours": partial(ours, weights), "separate": separate}
    report.case("gemm_m_grouped_dswiglu weighted", shape, flop, "TFLOP/s", with_weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per case")
    parser.add_argument("--products", action="store_true", help="only those in bfloat16, for a sweep of tiles")
    parser.add_argument("--json", type=Path, help="write everything there")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    small = device.type == "cpu"
    torch.manual_seed(0)
    report = Report(Clock(device, arguments.budget))
    if not arguments.products:
        bench_layer(report, device, *(SMALL_LAYER if small else LAYER))
        for shape in SMALL_MOVED if small else MOVED:
            bench_moved(report, device, *shape)
    for shape in SMALL_PRODUCTS if small else PRODUCTS:
        bench_products(report, device, *shape)
    if not arguments.products:
        for shape in SMALL_PRODUCTS if small else PRODUCTS:
            bench_fp8_products(report, device, *shape)
    for name, why in report.missing.items():
        print(f"not measured: {name}: {why}")
    if arguments.json:
        everything = {"machine": machine(device), "cases": report.rows, "not_measured": report.missing}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
