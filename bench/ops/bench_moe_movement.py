"""Routing, permute, unpermute, their gradients and SwiGLU: against the same work in plain torch operators and against
a copy of as many bytes.

Rates count the bytes that must be read and written at least once. `copy_` reads and writes half of them each. Shapes
come in two sizes: expert rows of 64 MiB and more, beyond the last-level cache, and of 4 MiB, inside it.

Beyond the cache, and with one thread in it, permute stands beside filling its output from a register, on the same
memory and threads: no permute writes faster. From that come our and index_select's share of the ceiling beyond the
cache, and the most that any permute could win.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from store_peak import store_calls
from timing import Report

from xtuner import _C, ops

ROUTES = [(tokens, k, e) for tokens in (4096, 16384, 65536) for k, e in ((4, 8), (8, 64), (8, 256))]
MIB = 1 << 20
LARGE = 64 * MIB
DTYPES = (torch.float32, torch.bfloat16)
STORED = ("ours", "index_select", "plain stores", "streaming stores")


class Rows(NamedTuple):
    tokens: int
    k: int
    experts: int
    hidden: int
    dtype: torch.dtype

    @classmethod
    def of_size(cls, size: int, k: int, hidden: int, dtype: torch.dtype) -> Rows:
        return cls(size // (k * hidden * dtype.itemsize), k, 64, hidden, dtype)

    def is_large(self) -> bool:
        return self.tokens * self.k * self.hidden * self.dtype.itemsize > LARGE // 2

    def __str__(self) -> str:
        return f"T{self.tokens} K{self.k} H{self.hidden} {'bf16' if self.dtype == torch.bfloat16 else 'f32'}"


def row_shapes(threads: int) -> list[Rows]:
    hidden = (512, 2048, 4096, 7168) if threads > 1 else (2048,)
    large = [Rows.of_size(LARGE, 8, h, dtype) for h in hidden for dtype in DTYPES]
    large.append(Rows.of_size(128 * MIB, 2, 4096, torch.bfloat16))  # tokens beyond the cache too
    return large + [Rows.of_size(4 * MIB, 8, h, dtype) for h in hidden[:2] for dtype in DTYPES]


def route(tokens: int, k: int, experts: int) -> torch.Tensor:
    return torch.rand(tokens, experts).topk(k).indices


def bench_routing(report: Report, tokens: int, k: int, experts: int) -> None:
    topk_idx = route(tokens, k, experts)

    def by_sorting():
        flat = topk_idx.flatten()
        order = torch.argsort(flat, stable=True)
        row_of = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        return torch.bincount(flat, minlength=experts).cumsum(0), row_of, order

    assert torch.equal(ops.route_map(topk_idx, experts)[2].flatten(), by_sorting()[1].int())
    moved = 1e-9 * topk_idx.numel() * (topk_idx.element_size() + 8)
    calls = {"ours": partial(ops.route_map, topk_idx, experts), "sort": by_sorting}
    report.case("route_map", f"T{tokens} K{k} E{experts}", moved, calls)


def copy_of(moved: int):
    """A copy that reads and writes `moved` bytes together."""
    return partial(torch.zeros(moved // 2, dtype=torch.uint8).copy_, torch.ones(moved // 2, dtype=torch.uint8))


def bench_rows(report: Report, s: Rows) -> None:
    threads, size = torch.get_num_threads(), s.dtype.itemsize * s.hidden * s.tokens
    _, _, row_of, src = ops.route_map(route(s.tokens, s.k, s.experts), s.experts)
    x, y = torch.ones(s.tokens, s.hidden, dtype=s.dtype), torch.ones(s.tokens * s.k, s.hidden, dtype=s.dtype)
    out_x, out_y, probs = torch.zeros_like(x), torch.zeros_like(y), torch.rand(s.tokens, s.k)
    token_of_row, prob_of_row = (src // s.k).long(), probs.flatten()[src.long()].unsqueeze(1)

    copy = copy_of(size * (1 + s.k))
    calls = {"ours": partial(_C.permute, x, row_of, src, out_y, threads), "copy_": copy}
    calls["index_select"] = partial(torch.index_select, x, 0, token_of_row, out=out_y)
    if s.is_large():
        calls |= store_calls(out_y, threads)
    elif threads == 1:  # another thread starts as slowly as this stores; streaming would take the cache from us
        calls["plain stores"] = store_calls(out_y, threads)["plain stores"]
    report.case("permute into out", str(s), 1e-9 * size * (1 + s.k), calls)
    calls = {"ours": partial(ops.permute, x, row_of, src), "index_select": partial(x.index_select, 0, token_of_row)}
    report.case("permute", str(s), 1e-9 * size * (1 + s.k), calls)

    def by_index_add():
        return torch.zeros(s.tokens, s.hidden).index_add_(0, token_of_row, y * prob_of_row).to(s.dtype)

    calls = {"ours": partial(_C.unpermute, y, row_of, probs, out_x, threads), "copy_": copy}
    report.case("unpermute into out", str(s), 1e-9 * size * (1 + s.k), calls)
    calls = {"ours": partial(ops.unpermute, y, row_of, src, probs), "index_add_": by_index_add}
    torch.testing.assert_close(*(call() for call in calls.values()), rtol=1e-2, atol=1e-2)
    report.case("unpermute", str(s), 1e-9 * size * (1 + s.k), calls)

    def backward_by_index_select():
        spread = x.index_select(0, token_of_row)
        return spread * prob_of_row, (spread * y).sum(1, dtype=torch.float32)

    del copy  # two copies of this size are too much memory
    ours = partial(_C.unpermute_bwd, x, y, src, row_of, probs, out_y, torch.empty_like(probs), threads)
    calls = {"ours": ours, "copy_": copy_of(size * (1 + 2 * s.k)), "index_select, mul, sum": backward_by_index_select}
    report.case("unpermute backward", str(s), 1e-9 * size * (1 + 2 * s.k), calls)


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


def store_ceilings(report: Report) -> dict[str, dict[str, float]]:
    """Of the permutes beyond the cache, per number of threads: bandwidths, shares of the ceiling, the most to win."""
    summary, sizes = {}, {}
    for threads in report.args.threads:
        sizes |= {str(s): s.tokens * s.k * s.hidden * s.dtype.itemsize for s in row_shapes(threads) if s.is_large()}
        filled = [r for r in report.rows if "plain stores" in r["wall_us"]]
        rows = [r for r in filled if r["threads"] == threads and r["shape"] in sizes]
        cases = [r["wall_us"] | {"bytes": sizes[r["shape"]]} for r in rows]
        if not cases:
            continue

        def mean(value, cases=cases) -> float:
            return statistics.geometric_mean(value(c) for c in cases)

        def ceiling(c) -> float:
            return min(c["plain stores"], c["streaming stores"])

        figures = {f"{n} GB/s": mean(lambda c, n=n: 1e-3 * c["bytes"] / c[n]) for n in STORED}
        figures |= {f"{n} share of ceiling": mean(lambda c, n=n: ceiling(c) / c[n]) for n in ("ours", "index_select")}
        figures["most over index_select"] = mean(lambda c: c["index_select"] / ceiling(c))
        summary[f"{threads} threads"] = {k: round(v, 3) for k, v in figures.items()}
        print(f"permute, stores of {threads} threads: " + ", ".join(f"{v:.2f} {k}" for k, v in figures.items()))
    return summary


def main() -> None:
    report = Report("MoE data movement", "GB/s")
    _C.keep_freed_memory()  # as in training: outputs are not made of fresh pages each time
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for tokens, k, experts in ROUTES:
            bench_routing(report, tokens, k, experts)
        for shape in row_shapes(threads):
            bench_rows(report, shape)
        for dtype in DTYPES:
            bench_swiglu(report, 8192, 256, dtype)
            bench_swiglu(report, 4096, 512, dtype)
    report.extra = {"store_ceilings": store_ceilings(report)}
    report.finish()


if __name__ == "__main__":
    main()
