"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor, Shard

from xtuner.parallel.dispatch import AllToAllDispatcher, FusedDispatcher
from xtuner.parallel.layout import Layout


def split_experts(model: nn.Module, layout: Layout, dispatcher: str) -> None:
    """Keep this rank's experts of every MoE block of `model`, and let one dispatcher take tokens to the others.

    Parameters keep their global shape as DTensors over the `ep` axis.
    """
    group = layout.ep.get_group()
    # One for all layers: an exchange is over before the next begins, so they share its buffers.
    dispatcher = FusedDispatcher(group) if dispatcher == "fused" else AllToAllDispatcher(group)
    for layer in model.layers:
        if layer.is_moe:
            layer.moe.dispatcher, layer.moe.to_local = dispatcher, DTensor.to_local
            for name in ("w13", "w2"):
                whole = getattr(layer.moe, name)
                rows = whole.detach().chunk(layout.ep.size())[layout.ep.get_local_rank()]
                mine = DTensor.from_local(
                    rows.clone(), layout.ep, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
                )
                setattr(layer.moe, name, nn.Parameter(mine))


def expert_parameters(layer: nn.Module) -> set[nn.Parameter]:
    return {layer.moe.w13, layer.moe.w2} if layer.is_moe else set()
