"""The router's choice with its gradient against the same in torch operators."""

from __future__ import annotations

from importlib import import_module

import torch
from timing import Report

from xtuner import ops

SHAPES = [(2048, 32, 4), (2048, 128, 8), (2048, 256, 8)]  # tokens, experts, choices


def main() -> None:
    report = Report("router", "Mtokens/s")
    in_torch = import_module("xtuner.ops.topk_softmax")._in_torch
    for threads in report.args.threads:
        torch.set_num_threads(threads)
        for tokens, experts, k in SHAPES:
            logits, grad = torch.randn(tokens, experts).requires_grad_(), torch.randn(tokens, k)

            def ours(logits=logits, grad=grad, k=k):
                torch.autograd.grad(ops.topk_softmax(logits, k, True).weights, logits, grad)

            def theirs(logits=logits, grad=grad, k=k):
                torch.autograd.grad(in_torch(logits, None, None, k, True)[0], logits, grad)

            calls = {"ours": ours, "torch": theirs}
            report.case("forward + backward", f"T{tokens} E{experts} K{k}", 1e-6 * tokens, calls)
    report.finish()


if __name__ == "__main__":
    main()
