"""One optimizer step: forward and backward over the micro-batches, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.batch import Batch
from xtuner.config import LossConfig
from xtuner.engine.out_of_memory import during
from xtuner.models import ModelOutput
from xtuner.nn.loss import load_balancing_loss, z_loss
from xtuner.nn.router import RouterStats
from xtuner.ops import raise_faults
from xtuner.optim import clip_grad_norm, update_choice_bias
from xtuner.parallel import World, check_overflow


@dataclass(frozen=True)
class StepResult:
    """What one step did, summed over all ranks and micro-batches.

    loss            cross-entropy in nats, averaged over loss weights
    aux_loss        load-balancing loss before its coefficient, averaged over micro-batches
    z_loss          router z-loss before its coefficient, averaged likewise
    grad_norm       before clipping
    skipped         the gradient was not finite, so weights did not change
    num_tokens      tokens that went through the model
    load_imbalance  busiest expert's tokens over the mean, averaged over MoE layers; 1 is perfect balance
    router_entropy  mean entropy of the routing distribution, in nats
    expert_counts   float64 [L, E], choices that went to each expert of each MoE layer
    """

    loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    skipped: bool
    num_tokens: int
    load_imbalance: float | None
    router_entropy: float | None
    expert_counts: Tensor | None

    def figures(self) -> dict[str, Any]:
        """All but the counts."""
        return {name: value for name, value in asdict(self).items() if name != "expert_counts"}


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    loss_cfg: LossConfig,
    max_grad_norm: float,
    world: World,
) -> StepResult:
    """Accumulate the gradient of the step's mean loss over all micro-batches and ranks, then update once.

    The cross-entropy is divided by the loss weight of the whole step, so a token counts the same whichever rank and
    micro-batch it falls into.
    """
    meter = accumulate_gradients(model, micro_batches, loss_cfg, world)
    check_overflow(model, world)
    raise_faults()
    with during("the optimizer's update"):
        grad_norm = clip_grad_norm(model.parameters(), max_grad_norm, world.all_reduce_sum)
        finite = math.isfinite(grad_norm)
        if finite:
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    result = meter.result(grad_norm, skipped=not finite)
    if finite and loss_cfg.bias_update_rate:
        update_choice_bias(model, result.expert_counts, loss_cfg.bias_update_rate)
    return result


def accumulate_gradients(
    model: nn.Module, micro_batches: Sequence[Batch], loss_cfg: LossConfig, world: World
) -> _Meter:
    """Forward and backward over the micro-batches; their figures."""
    weight = global_loss_weight(micro_batches, world)
    meter = _Meter(world)
    for batch in micro_batches:
        with during("the forward pass"):
            output = forward_loss(model, batch)
            loss = output.loss_sum / weight
            aux, z = auxiliary_losses(output.stats, batch, model, loss_cfg, world)
        share = 1 / len(micro_batches)
        with during("the backward pass"):
            (loss + share * (loss_cfg.aux_loss_coef * aux + loss_cfg.z_loss_coef * z)).backward()
        meter.add(loss, aux * share, z * share, batch.num_tokens, output.stats)
    return meter


def forward_loss(model: nn.Module, batch: Batch) -> ModelOutput:
    """Run `model` on `batch` up to the weighted sum of the tokens' cross-entropies."""
    return model(
        batch.input_ids,
        batch.positions,
        batch.cu_seqlens,
        batch.max_seqlen,
        labels=batch.labels,
        loss_weights=batch.loss_weights,
        routing=batch.routing,
        total_tokens=batch.total_tokens,
        cut=batch.cut,
    )


def global_loss_weight(micro_batches: Sequence[Batch], world: World) -> Tensor:
    """Sum of the loss weights of one step over micro-batches and ranks; 1 where nothing is learned, to divide by."""
    total = world.all_reduce_sum(torch.stack([b.loss_weights.sum() for b in micro_batches]).sum())
    return torch.where(total > 0, total, torch.ones_like(total))


def auxiliary_losses(
    stats: Sequence[RouterStats], batch: Batch, model: nn.Module, cfg: LossConfig, world: World
) -> tuple[Tensor, Tensor]:
    """This rank's share of (load-balancing loss, z-loss) of one micro-batch; the shares of all ranks sum to the whole.

    Both are zero for a dense model and where their coefficient is.
    """
    zero = torch.zeros((), device=batch.input_ids.device)
    if not stats:
        return zero, zero
    num_tokens = world.all_reduce_sum(torch.tensor(float(batch.num_tokens), device=zero.device))
    aux = z = zero
    if cfg.aux_loss != "none" and cfg.aux_loss_coef:
        top_k = model.cfg.moe.num_experts_per_tok
        aux = load_balancing_loss(stats, num_tokens, cfg.aux_loss, top_k, world.all_reduce_sum)
    if cfg.z_loss_coef:
        z = z_loss(stats, num_tokens)
    return aux, z


class _Meter:
    """Adds up detached figures during a step; one all-reduce at its end turns them into a StepResult."""

    def __init__(self, world: World):
        self.world = world
        self.sums = torch.zeros(5, device=world.device, dtype=torch.float64)
        self.counts: Tensor | None = None

    def add(self, loss: Tensor, aux: Tensor, z: Tensor, num_tokens: int, stats: Sequence[RouterStats]) -> None:
        entropy = torch.stack([s.entropy_sum for s in stats]).mean() if stats else torch.zeros_like(loss)
        tokens = torch.full_like(loss, num_tokens)
        self.sums += torch.stack([t.detach().double() for t in (loss, aux, z, tokens, entropy)])
        if stats:
            counts = torch.stack([s.counts.detach().double() for s in stats])
            self.counts = counts if self.counts is None else self.counts + counts

    def result(self, grad_norm: float, skipped: bool) -> StepResult:
        flat = self.sums if self.counts is None else torch.cat([self.sums, self.counts.flatten()])
        flat = self.world.all_reduce_sum(flat)
        loss, aux, z, tokens, entropy = flat[:5].tolist()
        counts_LE = None if self.counts is None else flat[5:].view_as(self.counts)
        return StepResult(
            loss=loss,
            aux_loss=aux,
            z_loss=z,
            grad_norm=grad_norm,
            skipped=skipped,
            num_tokens=int(tokens),
            load_imbalance=None if counts_LE is None else load_imbalance(counts_LE).mean().item(),
            router_entropy=entropy / tokens if counts_LE is not None and tokens else None,
            expert_counts=counts_LE,
        )


def load_imbalance(counts_LE: Tensor) -> Tensor:
    """[L]: the busiest expert's share over the mean."""
    return counts_LE.amax(1) / counts_LE.mean(1).clamp_min(1e-9)
