"""Dense products in the core, forward and both gradients, against torch's own and against a cast to float32 and back.

`ops.linear` uses the core where torch has no bfloat16 instructions (try --isa avx2), and in float32 from 8 rows on.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import Report

import xtuner.ops  # noqa: F401  registers the operators

SHAPES = {  # tokens, in, out
    torch.float32: [
        (8, 512, 512),
        (64, 512, 512),
        (2048, 512, 32),
        (2048, 512, 256),
        (2048, 512, 512),
        (512, 512, 8192),
    ],
    torch.bfloat16: [(512, 512, 512), (512, 512, 256), (128, 512, 2048)],
}


def cast(product, a, b):
    return product(a.float(), b.float()).to(a.dtype)


def main() -> None:
    report = Report("dense products", "GFLOP/s")
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        for dtype, shapes in SHAPES.items():
            for tokens, width, num_out in shapes:
                sizes = (tokens, width), (num_out, width), (tokens, num_out)
                x, w, g = (torch.randn(*size).to(dtype) for size in sizes)
                directions = {
                    "forward": (torch.ops.xtuner.linear, x, w, lambda a, b: a @ b.T),
                    "dgrad": (torch.ops.xtuner.linear_dgrad, g, w, lambda a, b: a @ b),
                    "wgrad": (torch.ops.xtuner.linear_wgrad, g, x, lambda a, b: a.T @ b),
                }
                for direction, (op, a, b, product) in directions.items():
                    calls = {"ours": partial(op, a, b), "torch": partial(product, a, b)}
                    if dtype == torch.bfloat16:
                        calls["cast"] = partial(cast, product, a, b)
                    name, shape = str(dtype).removeprefix("torch."), f"T{tokens} D{width} N{num_out}"
                    report.case(f"{direction} {name}", shape, 2e-9 * tokens * width * num_out, calls)
    report.finish()


if __name__ == "__main__":
    main()
