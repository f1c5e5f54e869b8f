"""The choice of experts: softmax, top-k, weights and the statistics of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import autograd, define, once_differentiable


class TopkSoftmax(NamedTuple):
    """T tokens, E experts, K choices. All float32 but the indices; weights, prob_sum and z_sum with gradient.

    weights      [T, K] probabilities of the choices, divided by their sum where `normalise`
    idx          int64 [T, K], the most probable first
    counts       [E] choices that went to each expert
    prob_sum     [E] softmax probabilities, summed over tokens
    z_sum        [] squared logsumexp of the logits, summed over tokens
    entropy_sum  [] entropy of the softmax in nats, summed over tokens
    """

    weights: Tensor
    idx: Tensor
    counts: Tensor
    prob_sum: Tensor
    z_sum: Tensor
    entropy_sum: Tensor


def topk_softmax(
    logits: Tensor,
    num_experts_per_tok: int,
    normalise: bool,
    choice_bias: Tensor | None = None,
    topk_idx: Tensor | None = None,
) -> TopkSoftmax:
    """Softmax over experts in one pass, and the K largest probabilities of each token; of equals the first.

    Args:
        logits: float32 [T, E].
        choice_bias: float32 [E], added to the probabilities for the choice only.
        topk_idx: int32 or int64 [T, K]: the choices, in [0, E), when they are already made.

    Raises:
        OpError: a given index outside [0, E); more choices than experts.
    """
    topk_idx = topk_idx if topk_idx is None else topk_idx.long().contiguous()
    outputs = torch.ops.xtuner.topk_softmax(logits, choice_bias, topk_idx, num_experts_per_tok, normalise)
    weights, idx, _, _, *sums = outputs
    return TopkSoftmax(weights, idx, *sums)


def _outputs(logits: Tensor, choice_bias, topk_idx, k: int, normalise: bool) -> tuple[Tensor, ...]:
    """weights, idx, probs, logsumexp, counts, prob_sum, z_sum, entropy_sum."""
    tokens, experts = logits.shape
    weights, probs = logits.new_empty(tokens, k), logits.new_empty(tokens, experts)
    counts, prob_sum = logits.new_empty(experts), logits.new_empty(experts)
    idx, logsumexp = logits.new_empty(tokens, k, dtype=torch.int64), logits.new_empty(tokens)
    return weights, idx, probs, logsumexp, counts, prob_sum, logits.new_empty(()), logits.new_empty(())


def _topk_softmax(logits: Tensor, choice_bias, topk_idx, k: int, normalise: bool) -> tuple[Tensor, ...]:
    if logits.device.type != "cpu":
        return _in_torch(logits, choice_bias, topk_idx, k, normalise)
    outputs = _outputs(logits, choice_bias, topk_idx, k, normalise)
    tokens, experts = logits.shape
    block = _C.topk_softmax_block_tokens
    workspace = logits.new_empty((tokens + block - 1) // block, 2 * experts + 2)
    logits, threads = logits.contiguous(), torch.get_num_threads()
    _C.topk_softmax(logits, choice_bias, topk_idx, normalise, *outputs, workspace, threads)
    return outputs


def _topk_softmax_bwd(dweights, dprob_sum, dz_sum, probs, logsumexp, idx, normalise: bool) -> Tensor:
    gradients = [g if g is None else g.contiguous() for g in (dweights, dprob_sum, dz_sum)]
    if probs.device.type != "cpu":
        return _in_torch_bwd(*gradients, probs, logsumexp, idx, normalise)
    dlogits = torch.empty_like(probs)
    _C.topk_softmax_bwd(*gradients, probs, logsumexp, idx, normalise, dlogits, torch.get_num_threads())
    return dlogits


def _in_torch(logits: Tensor, choice_bias, topk_idx, k: int, normalise: bool) -> tuple[Tensor, ...]:
    """Where the core has no kernel."""
    logsumexp = logits.logsumexp(-1)
    probs = (logits - logsumexp[:, None]).exp()
    scores = probs if choice_bias is None else probs + choice_bias
    idx = torch.topk(scores, k, dim=-1).indices if topk_idx is None else topk_idx.clone()
    weights = probs.gather(1, idx)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    counts = logits.new_zeros(logits.shape[1])
    counts = counts.scatter_add(0, idx.flatten(), torch.ones_like(weights).flatten())
    entropy = (logsumexp - (probs * logits).sum(-1)).sum()
    return weights, idx, probs, logsumexp, counts, probs.sum(0), logsumexp.square().sum(), entropy


def _in_torch_bwd(dweights, dprob_sum, dz_sum, probs, logsumexp, idx, normalise: bool) -> Tensor:
    dprobs = torch.zeros_like(probs) if dprob_sum is None else dprob_sum.expand_as(probs).contiguous()
    if dweights is not None:
        if normalise:
            chosen = probs.gather(1, idx)
            total = chosen.sum(-1, keepdim=True)
            dweights = (dweights - (dweights * chosen).sum(-1, keepdim=True) / total) / total
        dprobs = dprobs.scatter_add(1, idx, dweights)
    common = -(probs * dprobs).sum(-1)
    if dz_sum is not None:
        common = common + 2 * dz_sum * logsumexp
    return probs * (dprobs + common[:, None])


def _setup(ctx, inputs, output) -> None:
    ctx.normalise = inputs[4]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output[i] for i in (1, 2, 3, 4, 7)))
    ctx.save_for_backward(output[2], output[3], output[1])


def _backward(ctx, *grads):
    given = grads[0], grads[5], grads[6]
    if all(g is None for g in given):
        return (None,) * 5
    dlogits = torch.ops.xtuner.topk_softmax_bwd(*given, *ctx.saved_tensors, ctx.normalise)
    return dlogits, None, None, None, None


define(
    "topk_softmax(Tensor logits, Tensor? choice_bias, Tensor? topk_idx, int k, bool normalise)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _topk_softmax,
    _outputs,
)
define(
    "topk_softmax_bwd(Tensor? dweights, Tensor? dprob_sum, Tensor? dz_sum, Tensor probs, Tensor logsumexp, Tensor idx,"
    " bool normalise) -> Tensor",
    _topk_softmax_bwd,
    lambda dweights, dprob_sum, dz_sum, probs, *_: torch.empty_like(probs),
)
autograd("topk_softmax", _backward, _setup)
once_differentiable("topk_softmax_bwd")
