"""A whole layer of experts on a GPU: route, permute, products, activation, combine; without the router."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from xtuner.config import MoEConfig
from xtuner.nn.moe import MoE


def torch_layer(x_TD, idx_TK, weights_TK, w13_EFD, w2_EDI):
    """The same with torch's own operators."""
    flat = idx_TK.flatten()
    order = flat.argsort(stable=True)
    tokens = order // idx_TK.shape[1]
    ends = torch.bincount(flat, minlength=w2_EDI.shape[0]).cumsum(0).int()
    gate, up = torch._grouped_mm(x_TD[tokens], w13_EFD.transpose(1, 2), offs=ends).chunk(2, dim=1)
    y = torch._grouped_mm(F.silu(gate) * up, w2_EDI.transpose(1, 2), offs=ends)
    scaled = y * weights_TK.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(x_TD).index_add(0, tokens, scaled)


def bench_layer(report, device, tokens: int, k: int, experts: int, hidden: int, intermediate: int) -> None:
    """Operations as usually counted: 6 T K D I forward, twice that backward."""
    shape = f"T{tokens} K{k} E{experts} D{hidden} I{intermediate}"
    moe = MoE(hidden, MoEConfig(num_experts=experts, num_experts_per_tok=k, moe_intermediate_size=intermediate))
    moe = moe.to(device, torch.bfloat16)
    with torch.no_grad():
        for weight in (moe.w13, moe.w2):
            weight.normal_(0, 0.02)
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights, idx = torch.rand(tokens, experts, device=device).topk(k)
    weights = weights.detach().requires_grad_()
    dout = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    leaves = [x, weights, moe.w13, moe.w2]

    def ours(fp8: bool):
        moe.fp8 = fp8
        return moe.dispatcher.run(moe.experts, x, idx, weights, experts)

    def in_torch():
        return torch_layer(x, idx, weights, moe.w13.unflatten(0, (experts, -1)), moe.w2.unflatten(0, (experts, -1)))

    flop = 6e-12 * tokens * k * hidden * intermediate
    forward = {"ours": partial(ours, False), "ours_fp8": partial(ours, True), "torch": in_torch}
    report.case("moe_layer", shape, flop, "TFLOP/s", {n: without_gradient(call) for n, call in forward.items()})
    report.case("moe_layer_bwd", shape, 2 * flop, "TFLOP/s", {n: gradient(c, leaves, dout) for n, c in forward.items()})


def without_gradient(call: Callable) -> Callable:
    def run():
        with torch.no_grad():
            return call()

    return run


def gradient(forward: Callable, leaves: list[torch.Tensor], dout: torch.Tensor) -> Callable:
    """Of a forward pass that is done once, at the first call."""
    done = []

    def run():
        if not done:
            done.append(forward())
        return torch.autograd.grad(done[0], leaves, dout, retain_graph=True)

    return run
