"""Losses as sums that add up over ranks, whatever the split of the tokens."""

import pytest
import torch

from xtuner.config import MoEConfig
from xtuner.models import SIZES, build_model
from xtuner.nn.loss import load_balancing_loss, z_loss
from xtuner.nn.moe import MoE


def router_stats(x, seeds=(0, 1)):
    """Statistics of two MoE layers that both see x."""
    stats = []
    for seed in seeds:
        torch.manual_seed(seed)
        moe = MoE(8, MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=4))
        torch.nn.init.normal_(moe.gate.weight)
        torch.nn.init.zeros_(moe.w13), torch.nn.init.zeros_(moe.w2)
        stats.append(moe(x)[1])
    return stats


@pytest.mark.parametrize("mode", ["layer", "hf"])
def test_shares_of_ranks_add_up(mode):
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(3))
    whole_x = x.clone().requires_grad_()
    whole = router_stats(whole_x)
    whole_loss = load_balancing_loss(whole, torch.tensor(30.0), mode, 2) + z_loss(whole, torch.tensor(30.0))
    whole_loss.backward()
    counts = torch.stack([s.counts for s in whole])
    part_x = [p.clone().requires_grad_() for p in x.split([9, 21])]
    parts = []
    for p in part_x:  # all_reduce of the counts is what both "ranks" together counted
        stats = router_stats(p)
        share = load_balancing_loss(stats, torch.tensor(30.0), mode, 2, reduce_sum=lambda _: counts)
        share = share + z_loss(stats, torch.tensor(30.0))
        share.backward()
        parts.append(share)
    torch.testing.assert_close(sum(parts), whole_loss)
    torch.testing.assert_close(torch.cat([p.grad for p in part_x]), whole_x.grad, rtol=1e-4, atol=1e-7)


def test_a_batch_in_which_nothing_is_learned():
    model = build_model(SIZES["qwen3-moe-tiny"])
    model.init_weights(0)
    ids = torch.arange(6)
    cu = torch.tensor([0, 6], dtype=torch.int32)
    out = model(ids, ids[None], cu, 6, labels=ids, loss_weights=torch.zeros(6))
    assert out.loss_sum.item() == 0
    out.loss_sum.backward()  # every rank must take part in the backward pass, also this one
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
