"""The router's auxiliary losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xtuner.nn.router import RouterStats


def load_balancing_loss(
    stats: Sequence[RouterStats],
    num_tokens: Tensor,
    mode: str,
    num_experts_per_tok: int,
    reduce_sum: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:
    """This rank's share of the load-balancing loss; the shares of all ranks add up to it.

    "layer": E * sum_e f_e p_e averaged over layers, f_e the part of all choices that went to expert e and p_e its mean
    probability (Switch Transformer, Fedus et al. 2021, eq. 4); 1 when perfectly balanced.
    "hf": transformers' definition — all layers pooled into one, and f_e counts choices per token, so that balance
    is num_experts_per_tok.

    Args:
        num_tokens: tokens of the micro-batch over all ranks.
        reduce_sum: sums a tensor over ranks, without gradient.
    """
    counts_LE = reduce_sum(torch.stack([s.counts for s in stats]))
    prob_sums_LE = torch.stack([s.prob_sum for s in stats])
    num_layers, num_experts = counts_LE.shape
    if mode == "hf":
        pooled = num_layers * num_tokens
        return num_experts * (counts_LE.sum(0) / pooled * (prob_sums_LE.sum(0) / pooled)).sum()
    if mode == "layer":
        part_LE = counts_LE / (num_tokens * num_experts_per_tok)
        return num_experts * (part_LE * prob_sums_LE / num_tokens).sum() / num_layers
    raise ValueError(f"mode={mode!r}: must be 'layer' or 'hf'")


def z_loss(stats: Sequence[RouterStats], num_tokens: Tensor) -> Tensor:
    """This rank's share of mean over tokens and layers of logsumexp(router logits)^2 (ST-MoE, Zoph et al. 2022)."""
    return torch.stack([s.z_sum for s in stats]).mean() / num_tokens
