"""Grouped GEMM against a loop of torch.mm over the experts (both into given memory) and torch._grouped_mm (allocating).

forward: x W^T; dgrad: g W; wgrad: g^T x, on the shapes of shapes.py. Rates count 2 * rows * N * K for everybody. At the
end, per direction, the geometric mean over cases of our speed over the faster rival's, and the share of the machine's
multiply-add peak. With --dtype bfloat16 also a loop that casts to float32, multiplies and casts back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from fma_peak import fma_peak_gflops
from shapes import EXPERTS, LOADS, MEAN_ROWS, row_offsets
from timing import Report

from xtuner import _C, ops

DIRECTIONS = ("forward", "dgrad", "wgrad")


def mm_loop(operands, cast: bool) -> Callable:
    def run() -> None:
        for a, b, c in operands:
            if cast:
                c.copy_(a.float() @ b.float())
            else:
                torch.mm(a, b, out=c)

    return run


def calls_of(direction: str, x, w, g, offsets) -> tuple[dict, dict]:
    """Calls that write into given memory, and calls that allocate."""
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    ends, threads = offsets[1:].to(torch.int32), torch.get_num_threads()
    if direction == "forward":
        out = torch.empty_like(g)
        loop = [(x[b:e], w[i].t(), out[b:e]) for i, (b, e) in enumerate(bounds)]
        ours_out = partial(_C.gemm_m_grouped, x, w, offsets, True, out=out, num_threads=threads)
        ours = partial(ops.gemm_m_grouped, x, w, offsets)
        grouped = partial(torch._grouped_mm, x, w.transpose(1, 2), offs=ends)
    elif direction == "dgrad":
        out = torch.empty_like(x)
        loop = [(g[b:e], w[i], out[b:e]) for i, (b, e) in enumerate(bounds)]
        ours_out = partial(_C.gemm_m_grouped, g, w, offsets, False, out=out, num_threads=threads)
        ours = partial(ops.gemm_m_grouped, g, w, offsets, False)
        grouped = partial(torch._grouped_mm, g, w, offs=ends)
    else:
        out = torch.empty_like(w)
        loop = [(g[b:e].t(), x[b:e], out[i]) for i, (b, e) in enumerate(bounds)]
        ours_out = partial(_C.gemm_k_grouped, g, x, offsets, 0.0, out=out, num_threads=threads)
        ours = partial(ops.gemm_k_grouped, g, x, offsets)
        grouped = partial(torch._grouped_mm, g.t(), x, offs=ends)
    given = {"ours": ours_out, "torch.mm loop": mm_loop(loop, cast=False)}
    if x.dtype == torch.bfloat16:
        given["loop in float32"] = mm_loop(loop, cast=True)
    return given, {"ours": ours, "torch._grouped_mm": grouped}


def summarise(report: Report, peaks: dict[int, float]) -> dict[str, dict[str, float]]:
    """Over the faster of torch's two, and where it was measured over the float32 loop; share of the peak."""
    cases: dict[tuple, dict[str, float]] = {}
    for row in report.rows:
        key = (row["threads"], row["group"].split()[0], row["shape"])
        case = cases.setdefault(key, {"rate": 0.0})
        case.update(row["wall_speedup_over"])
        case["rate"] = max(case["rate"], row["rate"])
    groups: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for (threads, direction, shape), case in cases.items():
        kind = "512 balanced" if shape.endswith("512 balanced") else "rows <= 128 or zipf"
        groups.setdefault(f"{direction}, {kind}, {threads} threads", []).append((peaks[threads], case))
    summary = {}
    for name, group in groups.items():
        over_torch = [min(c["torch.mm loop"], c["torch._grouped_mm"]) for _, c in group]
        figures = {"over the faster of torch's": statistics.geometric_mean(over_torch), "least": min(over_torch)}
        casts = [c["loop in float32"] for _, c in group if "loop in float32" in c]
        if casts:
            figures["over the loop in float32"] = statistics.geometric_mean(casts)
        figures["least share of the float32 peak"] = min(c["rate"] / peak for peak, c in group)
        summary[name] = {k: round(v, 3) for k, v in figures.items()}
        print(f"{name:40s} " + ", ".join(f"{v:.2f} {k}" for k, v in figures.items()))
    return summary


def main() -> None:
    report = Report("grouped GEMM", "GFLOP/s", add_arguments)
    report.title += f", {report.args.dtype}"
    dtype = getattr(torch, report.args.dtype)
    _C.keep_freed_memory()  # as the engine does; else whoever allocates pays for fresh pages, ten times a small product
    peaks = {threads: fma_peak_gflops(threads) for threads in report.args.threads}
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        for shape in EXPERTS:
            if report.args.models and not any(shape.name.startswith(m) for m in report.args.models):
                continue
            generator = torch.Generator().manual_seed(1)
            w = torch.randn(shape.num_experts, shape.n, shape.k, generator=generator).to(dtype)
            for mean_rows in report.args.rows:
                for load in LOADS:
                    offsets = row_offsets(shape.num_experts, mean_rows, load)
                    rows = int(offsets[-1])
                    x, g = (torch.randn(rows, n, generator=generator).to(dtype) for n in (shape.k, shape.n))
                    for direction in report.args.directions:
                        given, allocating = calls_of(direction, x, w, g, offsets)
                        name = f"{shape.name} {mean_rows} {load}"
                        work = 2e-9 * rows * shape.n * shape.k
                        report.case(f"{direction} {report.args.dtype} into out", name, work, given)
                        report.case(f"{direction} {report.args.dtype}", name, work, allocating)
    report.extra = {"fma_peak_gflops": peaks, "goals": summarise(report, peaks)}
    report.finish()


def add_arguments(parser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--models", nargs="+", help="shapes whose names begin so; default all")
    parser.add_argument("--rows", type=int, nargs="+", default=MEAN_ROWS, help="mean rows per expert")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)


if __name__ == "__main__":
    main()
