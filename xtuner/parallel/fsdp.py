"""Fully sharded data parallelism: every block is one unit of gather, compute and reduce."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard

from xtuner.config import MemoryConfig, ParallelConfig
from xtuner.parallel.expert import expert_parameters
from xtuner.parallel.layout import Layout


def shard_model(model: nn.Module, layout: Layout, cfg: ParallelConfig, memory: MemoryConfig) -> None:
    """Shard `model` in place: its `layers` one by one, then what is left (embedding, head).

    Everything is sharded over `layout.dense`, except that experts split over an `ep` axis are sharded over the ranks
    that hold the same ones. Master weights keep their dtype (float32); gathered weights and activations are
    `cfg.compute_dtype`; gradients are summed, not averaged, in `memory.reduce_dtype`, because the loss is already
    divided by the step's global token weight. A rank's experts see the tokens of its whole `ep` group, so that the
    same sum is right for them.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, cfg.compute_dtype),
        reduce_dtype=getattr(torch, memory.reduce_dtype),
        cast_forward_inputs=False,
    )
    on_gpu = layout.dense.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if memory.offload_parameters else OffloadPolicy()
    for layer in model.layers:
        placement = _experts_apart(layer, layout) if layout.ep is not None else None
        fully_shard(
            layer,
            mesh=layout.dense,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=cfg.reshard_after_forward,
            shard_placement_fn=placement,
        )
    # The root is needed again at the start of backward, so resharding it would only gather it twice.
    fully_shard(model, mesh=layout.dense, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    for module in (*model.layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    for layer, following in zip(model.layers, model.layers[1:], strict=False):
        layer.set_modules_to_forward_prefetch([following])  # the host may wait for routing, so it cannot run ahead


def _experts_apart(layer: nn.Module, layout: Layout):
    mesh, experts = layout.expert_shard, expert_parameters(layer)
    info = FSDPMeshInfo(mesh, 0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    return lambda param: ShardPlacementResult(Shard(0), info) if param in experts else None
