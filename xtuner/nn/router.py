"""Which experts each token visits, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from xtuner import ops


class RouterStats(NamedTuple):
    """Sums over one layer's tokens, from which balance losses and metrics are made. E experts.

    counts      float32[E]  choices that went to each expert
    prob_sum    float32[E]  softmax probabilities, with gradient
    z_sum       float32[]   squared logsumexp of the logits, with gradient
    entropy_sum float32[]   entropy of the softmax, in nats
    topk_idx    int32[T, K] the choices, to be replayed in recomputation
    """

    counts: Tensor
    prob_sum: Tensor
    z_sum: Tensor
    entropy_sum: Tensor
    topk_idx: Tensor

    def joined(self, other: RouterStats) -> RouterStats:
        """Of these tokens and, after them, the other's."""
        sums = [a + b for a, b in zip(self[:-1], other[:-1], strict=True)]
        return RouterStats(*sums, torch.cat([self.topk_idx, other.topk_idx]))


class Router(nn.Module):
    """Top-k over a softmax, computed in float32.

    With `choice_bias` a buffer of that name, float32 [E], is added to the probabilities for the choice only, which
    balances load without a loss (Wang et al. 2024, arXiv 2408.15664): weights and gradients do not see it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
        choice_bias: bool = False,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("choice_bias", torch.zeros(num_experts) if choice_bias else None)
        self.top_k, self.normalise = num_experts_per_tok, norm_topk_prob

    def forward(self, x_TD: Tensor, topk_idx: Tensor | None = None) -> tuple[Tensor, Tensor, RouterStats]:
        """Weights float32 [T, K], expert indices int64 [T, K] and statistics.

        Given `topk_idx` the choice is replayed; the weights still come from the live logits, with gradient.
        """
        logits_TE = ops.linear(x_TD.float(), self.weight.float())
        bias = None if self.choice_bias is None else self.choice_bias.float()
        weights_TK, idx_TK, *sums = ops.topk_softmax(logits_TE, self.top_k, self.normalise, bias, topk_idx)
        return weights_TK, idx_TK, RouterStats(*sums, idx_TK.int())
