"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor, Shard

from xtuner.config import ParallelConfig
from xtuner.parallel.dispatch import AllToAllDispatcher, Dispatcher, FusedDispatcher
from xtuner.parallel.dispatch_presum import PresumDispatcher
from xtuner.parallel.layout import Layout
from xtuner.parallel.world import World


def make_dispatcher(cfg: ParallelConfig, layout: Layout, world: World) -> Dispatcher:
    """The one that `cfg` names, or fused where every group's ranks share a machine's memory. Collective over groups.

    On GPUs fused has to be asked for: no run on hardware has shown yet that it is the better one there.
    """
    kind = "presum" if cfg.combine == "presum" else cfg.dispatcher
    if kind == "auto":
        on_one_host = world.local_size % cfg.ep_size == 0
        kind = "fused" if on_one_host and world.device.type == "cpu" else "all_to_all"
    dispatchers = {"fused": FusedDispatcher, "all_to_all": AllToAllDispatcher, "presum": PresumDispatcher}
    bounds = {"mode": cfg.dispatch_mode, "capacity_factor": cfg.capacity_factor, "max_load": cfg.max_load}
    where = {"device": world.device} if kind == "fused" else {}
    return dispatchers[kind](layout.ep.get_group(), **where, **bounds)


def split_experts(model: nn.Module, layout: Layout, dispatcher: Dispatcher) -> None:
    """Keep this rank's experts of every MoE block of `model`, and let `dispatcher` take tokens to the others.

    One dispatcher serves all layers: an exchange is over before the next begins. Parameters keep their global shape as
    DTensors over the `ep` axis.
    """
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
