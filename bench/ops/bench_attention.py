"""Attention over packed documents, against torch's CPU flash kernel called document by document and on a whole batch.

Work counts the multiplications and additions of visible pairs of query and key only: 2 (D + Dv) each forward and
2 (3 D + 2 Dv) each backward, for all rivals alike.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import Report
from torch import Tensor

from xtuner import ops  # noqa: F401  registers torch.ops.xtuner

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Case(NamedTuple):
    name: str
    lengths_q: list[int]
    lengths_k: list[int]
    heads: tuple[int, int]
    width: int

    def pairs(self) -> int:
        rows = zip(self.lengths_q, self.lengths_k, strict=True)
        return self.heads[0] * sum(q * (k - q) + q * (q + 1) // 2 for q, k in rows)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        num_q, num_k = sum(self.lengths_q), sum(self.lengths_k)
        rows = (num_q, self.heads[0]), (num_k, self.heads[1]), (num_k, self.heads[1])
        return tuple(torch.randn(*r, self.width).to(dtype) for r in rows)

    def equal(self) -> bool:
        return len(set(self.lengths_q)) == 1 and self.lengths_q == self.lengths_k


def training(name: str, lengths: list[int], heads: tuple[int, int], width: int) -> Case:
    return Case(name, lengths, lengths, heads, width)


PACK = training("4 x 512", [512] * 4, (8, 4), 64)
SHORT = training("64 x 32..128", torch.linspace(32, 128, 64).int().tolist(), (8, 4), 64)
LONG = training("1 x 4096", [4096], (16, 2), 128)
MEDIUM = training("1 x 2048", [2048], (16, 2), 128)  # torch's bf16 backward takes too long for more
GENERATION = [
    Case("8 x 1 query, 4096 keys", [1] * 8, [4096] * 8, (16, 2), 128),
    Case("32 x 1 query, 512 keys", [1] * 32, [512] * 32, (8, 4), 64),
]


class Batch(NamedTuple):
    """A run of consecutive documents of equal lengths, as torch's kernel takes them: [documents, H, length, D]."""

    rows_q: slice
    rows_k: slice
    count: int

    def queries(self, x_THD: Tensor) -> Tensor:
        return x_THD[self.rows_q].unflatten(0, (self.count, -1)).transpose(1, 2)

    def keys(self, x_THD: Tensor) -> Tensor:
        return x_THD[self.rows_k].unflatten(0, (self.count, -1)).transpose(1, 2)


class PerDocument:
    """torch's kernel behind the packed interface: one call per run of equal documents."""

    def __init__(self, case: Case):
        self.causal = case.lengths_q == case.lengths_k  # a single query sees all keys anyway
        self.batches = []
        q = k = 0
        for (len_q, len_k), run in groupby(zip(case.lengths_q, case.lengths_k, strict=True)):
            count = len(list(run))
            self.batches.append(Batch(slice(q, q + count * len_q), slice(k, k + count * len_k), count))
            q, k = q + count * len_q, k + count * len_k

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), torch.empty(*q.shape[:2], 1)
        for b in self.batches:
            run_out, run_lse = flash(b.queries(q), b.keys(k), b.keys(v), is_causal=self.causal)
            b.queries(out).copy_(run_out)
            b.queries(lse).copy_(run_lse.unsqueeze(-1))
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        grads = dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for b in self.batches:
            inputs = b.queries(dout), b.queries(q), b.keys(k), b.keys(v), b.queries(out), b.queries(lse).squeeze(-1)
            gq, gk, gv = flash_bwd(*inputs, 0.0, self.causal)
            b.queries(dq).copy_(gq)
            b.keys(dk).copy_(gk)
            b.keys(dv).copy_(gv)
        return grads


def bench(report: Report, case: Case, dtype: torch.dtype, backward: bool) -> None:
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (case.lengths_q, case.lengths_k))
    options = cu_q, cu_k, max(case.lengths_q), max(case.lengths_k), case.width**-0.5, True
    q, k, v = case.tensors(dtype)
    rival = PerDocument(case)
    shape = f"{case.name}, heads {case.heads[0]}/{case.heads[1]}, D{case.width}"
    name = str(dtype).removeprefix("torch.")

    def forward():
        return torch.ops.xtuner.attention(q, k, v, *options)

    calls = {"ours": forward, "per document": lambda: rival.forward(q, k, v)}
    if case.equal():
        count = len(case.lengths_q)
        batch = [x.unflatten(0, (count, -1)).transpose(1, 2).contiguous() for x in (q, k, v)]
        calls["batched sdpa"] = lambda: F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
    report.case(f"forward {name}", shape, 4e-9 * case.pairs() * case.width, calls)
    if not backward:
        return
    dout, saved, rival_saved = torch.randn_like(q), forward(), rival.forward(q, k, v)
    calls = {
        "ours": lambda: torch.ops.xtuner.attention_bwd(dout, q, k, v, *saved, *options),
        "per document": lambda: rival.backward(dout, q, k, v, *rival_saved),
    }
    if case.equal():
        grad = dout.unflatten(0, (count, -1)).transpose(1, 2).contiguous()
        batch_saved = flash(*batch, is_causal=True)
        calls["batched sdpa"] = lambda: flash_bwd(grad, *batch, *batch_saved, 0.0, True)
    report.case(f"backward {name}", shape, 10e-9 * case.pairs() * case.width, calls)


def main() -> None:
    report = Report("attention", "GFLOP/s")
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16):
            for case in (PACK, SHORT):
                bench(report, case, dtype, backward=True)
            for case in GENERATION:
                bench(report, case, dtype, backward=False)
            if threads == max(report.args.threads):
                bench(report, LONG if dtype == torch.float32 else MEDIUM, dtype, backward=True)
    report.finish()


if __name__ == "__main__":
    main()
