"""Routing, permute, unpermute and SwiGLU, forward and backward, against the same work in plain torch operators.

Rates count the bytes that must be read and written at least once.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timing import Report

from xtuner import _C, ops

SHAPES = [(2048, 4, 32, 512), (4096, 2, 8, 512), (1024, 8, 64, 1024)]  # tokens, experts per token, experts, hidden


def bench_routing(report: Report, topk_idx, num_experts: int, shape: str) -> None:
    def in_torch():
        flat = topk_idx.flatten()
        order = torch.argsort(flat, stable=True)
        row_of = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        return torch.bincount(flat, minlength=num_experts).cumsum(0), row_of, order

    moved = 1e-9 * topk_idx.numel() * (topk_idx.element_size() + 8)
    report.case("route_map", shape, moved, {"ours": lambda: ops.route_map(topk_idx, num_experts), "argsort": in_torch})


def bench_rows(report: Report, topk_idx, num_experts: int, hidden: int, dtype, shape: str) -> None:
    tokens, k = topk_idx.shape
    _, _, row_of, src = ops.route_map(topk_idx, num_experts)
    name = str(dtype).removeprefix("torch.")
    x, y = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens * k, hidden).to(dtype)
    probs = torch.rand(tokens, k)
    token_of_row = (src // k).long()
    prob_of_row = probs.flatten()[src.long()].unsqueeze(1)
    size = x.element_size() * 1e-9 * hidden * tokens
    threads = torch.get_num_threads()
    dy, dprobs = torch.empty_like(y), torch.empty_like(probs)

    def unpermute_in_torch():
        return torch.zeros(tokens, hidden).index_add_(0, token_of_row, y * prob_of_row).to(dtype)

    def unpermute_backward_in_torch():
        spread = x.index_select(0, token_of_row)
        return spread * prob_of_row, (spread * y).sum(1, dtype=torch.float32)

    calls = {"ours": lambda: ops.permute(x, row_of, src), "index_select": lambda: x.index_select(0, token_of_row)}
    report.case(f"permute {name}", shape, size * (1 + k), calls)
    calls = {"ours": lambda: ops.unpermute(y, row_of, src, probs), "index_add": unpermute_in_torch}
    report.case(f"unpermute {name}", shape, size * (1 + k), calls)
    ours = partial(_C.unpermute_bwd, x, y, src, row_of, probs, dy, dprobs, threads)
    calls = {"ours": ours, "index_select, mul, sum": unpermute_backward_in_torch}
    report.case(f"unpermute backward {name}", shape, size * (1 + 2 * k), calls)


def bench_swiglu(report: Report, rows: int, width: int, dtype) -> None:
    name, shape = str(dtype).removeprefix("torch."), f"R{rows} I{width}"
    x, dout = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    dx, threads = torch.empty_like(x), torch.get_num_threads()
    gate, up = x.chunk(2, dim=1)
    size = x.element_size() * 1e-9 * rows * width
    calls = {"ours": lambda: ops.swiglu(x), "silu * up": lambda: F.silu(gate) * up}
    report.case(f"swiglu {name}", shape, 3 * size, calls)

    def backward_in_torch():
        act = F.silu(gate)
        return torch.cat([torch.ops.aten.silu_backward(dout * up, gate), dout * act], dim=1)

    ours = partial(_C.swiglu_bwd, dout, x, None, 1.0, None, 0.0, dx, threads)
    calls = {"ours": ours, "silu_backward, mul, cat": backward_in_torch}
    report.case(f"swiglu backward {name}", shape, 5 * size, calls)


def main() -> None:
    report = Report("MoE data movement", "GB/s")
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for tokens, k, num_experts, hidden in SHAPES:
            topk_idx = torch.rand(tokens, num_experts).topk(k).indices
            shape = f"T{tokens} K{k} E{num_experts} H{hidden}"
            bench_routing(report, topk_idx, num_experts, shape)
            for dtype in (torch.float32, torch.bfloat16):
                bench_rows(report, topk_idx, num_experts, hidden, dtype, shape)
        for dtype in (torch.float32, torch.bfloat16):
            bench_swiglu(report, 8192, 256, dtype)
            bench_swiglu(report, 4096, 512, dtype)
    report.finish()


if __name__ == "__main__":
    main()
