"""The choice of experts in DeepSeek-V3: sigmoid scores, and groups of experts before experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xtuner.config import MoEConfig
from xtuner.nn.router import Router, RouterStats


class GroupedRouter(Router):
    """Sigmoid scores in float32 (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Of `num_groups` groups the `topk_groups` best are left, by the sum of their two best biased scores, and of their
    experts the best by biased score. Weights are the unbiased scores, times `routed_scaling_factor`.
    """

    def __init__(self, hidden_size: int, cfg: MoEConfig):
        super().__init__(hidden_size, cfg.num_experts, cfg.num_experts_per_tok, cfg.norm_topk_prob, cfg.choice_bias)
        self.num_groups, self.topk_groups, self.factor = cfg.num_groups, cfg.topk_groups, cfg.routed_scaling_factor

    def forward(self, x_TD: Tensor, topk_idx: Tensor | None = None) -> tuple[Tensor, Tensor, RouterStats]:
        """As `Router.forward`. The probabilities in the statistics are scores over their sum (eq. 18)."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.sigmoid()
        if topk_idx is None:
            topk_idx = self._choose(scores_TE.detach())
        topk_idx = topk_idx.long()
        weights_TK = scores_TE.gather(1, topk_idx)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        with torch.no_grad():
            counts_E = probs_TE.new_zeros(probs_TE.shape[1])
            counts_E = counts_E.scatter_add(0, topk_idx.flatten(), torch.ones_like(weights_TK).flatten())
            entropy = torch.special.entr(probs_TE).sum()
        z_sum = logits_TE.logsumexp(-1).square().sum()
        stats = RouterStats(counts_E, probs_TE.sum(0), z_sum, entropy, topk_idx.int())
        return weights_TK * self.factor, topk_idx, stats

    def _choose(self, scores_TE: Tensor) -> Tensor:
        biased_TE = scores_TE if self.choice_bias is None else scores_TE + self.choice_bias
        if self.num_groups > 1:
            grouped = biased_TE.unflatten(1, (self.num_groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
            left = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
            biased_TE = grouped.masked_fill(~left[..., None], float("-inf")).flatten(1)
        return biased_TE.topk(self.top_k, dim=-1).indices
