"""RMSNorm, rotary and both in one, forward with backward, against transformers' formulas in plain torch operators.

Rates count the bytes that must be read and written at least once.
"""

from __future__ import annotations

import torch
from timing import Report

from xtuner import ops

NORMS = [(2048, 512), (16384, 64), (2048, 2048)]
ROTATIONS = [(2048, 8, 64), (2048, 32, 128)]


def formula_norm(x, weight, eps):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def formula_rotary(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, None] for t in (cos, sin))
    return x * wide_cos + torch.cat([-second, first], -1) * wide_sin


def formula_both(x, weight, cos, sin, eps):
    return formula_rotary(formula_norm(x, weight, eps), cos, sin)


def two_operators(x, weight, cos, sin, eps):
    return ops.rotary(ops.rms_norm(x, weight, eps), cos, sin)


def step(function, x, *others):
    grad = torch.ones_like(x)

    def call():
        x.grad = None
        function(x, *others).backward(grad)

    return call


def main() -> None:
    report = Report("norm and rotary", "GB/s")
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            for shape in NORMS:
                x = torch.randn(shape).to(dtype).requires_grad_()
                weight = torch.ones(shape[-1], dtype=dtype, requires_grad=True)
                moved = 5e-9 * x.numel() * x.element_size()  # x, out; dout, x, dx
                calls = {f: step(g, x, weight, 1e-6) for f, g in (("ours", ops.rms_norm), ("formula", formula_norm))}
                report.case(f"rms_norm {name}", "R{} D{}".format(*shape), moved, calls)
            for shape in ROTATIONS:
                x = torch.randn(shape).to(dtype).requires_grad_()
                tables = [torch.rand(shape[0], shape[2] // 2).to(dtype) for _ in range(2)]
                moved = 4e-9 * x.numel() * x.element_size()
                calls = {f: step(g, x, *tables) for f, g in (("ours", ops.rotary), ("formula", formula_rotary))}
                report.case(f"rotary {name}", "T{} H{} D{}".format(*shape), moved, calls)
                weight = torch.ones(shape[-1], dtype=dtype, requires_grad=True)
                calls = {
                    "ours": step(ops.rms_norm_rotary, x, weight, *tables, 1e-6),
                    "two": step(two_operators, x, weight, *tables, 1e-6),
                    "formula": step(formula_both, x, weight, *tables, 1e-6),
                }
                moved = 5e-9 * x.numel() * x.element_size()
                report.case(f"rms_norm_rotary {name}", "T{} H{} D{}".format(*shape), moved, calls)
    report.finish()


if __name__ == "__main__":
    main()
