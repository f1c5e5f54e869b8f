"""The MoE block as a whole: against a loop over experts, with replayed routing, compiled."""

import pytest
import torch
import torch.nn.functional as F

from xtuner.config import MoEConfig
from xtuner.nn.moe import MoE


def make(num_experts=5, k=2, seed=0, **fields):
    torch.manual_seed(seed)
    cfg = MoEConfig(num_experts=num_experts, num_experts_per_tok=k, moe_intermediate_size=12, **fields)
    moe = MoE(16, cfg)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.3)
    return moe, torch.randn(30, 16)


def loop_over_experts(moe, x, idx=None):
    """What the block means, one expert at a time."""
    probs = (x @ moe.gate.weight.T).softmax(-1)
    chosen = probs.topk(moe.gate.top_k).indices if idx is None else idx
    weights = probs.gather(1, chosen)
    if moe.gate.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    w13, w2 = moe.w13.unflatten(0, (moe.num_experts, -1)), moe.w2.unflatten(0, (moe.num_experts, -1))
    for e in range(moe.num_experts):
        gate, up = (x @ w13[e].T).chunk(2, -1)
        weight = (weights * (chosen == e)).sum(-1, keepdim=True)
        out = out + weight * ((F.silu(gate) * up) @ w2[e].T)
    return out


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_equals_a_loop_over_experts(norm_topk_prob):
    moe, x = make(norm_topk_prob=norm_topk_prob)
    ours = x.clone().requires_grad_()
    theirs = x.clone().requires_grad_()
    y, _ = moe(ours)
    expected = loop_over_experts(moe, theirs)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [ours, *moe.parameters()], grad)
    for got, want in zip(gradients, torch.autograd.grad(expected, [theirs, *moe.parameters()], grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_replayed_routing_keeps_live_weights_and_their_gradient():
    moe, x = make()
    idx = torch.randint(0, 5, (30, 1)).repeat(1, 2)
    idx[:, 1] = (idx[:, 0] + 1) % 5
    y, stats = moe(x, topk_idx=idx.int())
    torch.testing.assert_close(y, loop_over_experts(moe, x, idx))
    assert torch.equal(stats.counts, idx.flatten().bincount(minlength=5).float())
    y.square().sum().backward()
    assert moe.gate.weight.grad.abs().sum() > 0


def test_statistics():
    moe, x = make()
    _, stats = moe(x)
    logits = x @ moe.gate.weight.T
    probs = logits.softmax(-1)
    torch.testing.assert_close(stats.prob_sum, probs.sum(0))
    torch.testing.assert_close(stats.z_sum, logits.logsumexp(-1).square().sum())
    torch.testing.assert_close(stats.entropy_sum, -(probs * probs.log()).sum())
    assert stats.counts.sum() == 60 and not stats.counts.requires_grad


def test_no_tokens_at_all():
    moe, _ = make()
    y, stats = moe(torch.zeros(0, 16))
    assert y.shape == (0, 16) and stats.counts.sum() == 0


def test_compiles_without_a_graph_break():
    moe, x = make()

    def run(block):
        y, stats = block(x)
        (y.square().sum() + stats.prob_sum.square().sum()).backward()
        gradients = [p.grad.clone() for p in moe.parameters()]
        moe.zero_grad()
        return [y.detach(), *gradients]

    expected = run(moe)
    for got, want in zip(run(torch.compile(moe, fullgraph=True)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
