"""Held-out loss over a whole validation set."""

from __future__ import annotations

import torch
from torch import nn

from xtuner.data import PackedDataset, collate
from xtuner.engine.train_step import forward_loss
from xtuner.parallel import Layout, World


@torch.no_grad()
def validation_loss(
    model: nn.Module, dataset: PackedDataset, world: World, layout: Layout, max_packs: int | None = None
) -> float:
    """Cross-entropy in nats per learned token, over the first `max_packs` packs (None: all). Collective.

    Ranks take packs in turn. Where they do not divide evenly, a rank without a pack of its own repeats the last one
    with weight zero, because FSDP's collectives need every rank in every forward pass.
    """
    num_packs = min(len(dataset), max_packs or len(dataset))
    sums = torch.zeros(2, device=world.device, dtype=torch.float64)
    for first in range(0, num_packs, layout.data_size):
        index = first + layout.data_rank
        batch = layout.slice(collate([dataset[min(index, num_packs - 1)]])).to(world.device)
        loss_sum = forward_loss(model, batch).loss_sum
        if index < num_packs:
            sums += torch.stack([loss_sum.double(), batch.loss_weights.sum().double()])
    loss, weight = world.all_reduce_sum(sums).tolist()
    return loss / weight
