"""Fully sharded data parallelism: every block is one unit of gather, compute and reduce."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from xtuner.config import ParallelConfig


def shard_model(model: nn.Module, mesh: DeviceMesh, cfg: ParallelConfig) -> nn.Module:
    """Shard `model` in place over the axis of `mesh`: its `layers` one by one, then what is left (embedding, head).

    Master weights keep their dtype (float32); gathered weights and activations are `cfg.compute_dtype`; gradients are
    summed, not averaged, in float32, because the loss is already divided by the step's global token weight.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, cfg.compute_dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward)
    # The root is needed again at the start of backward, so resharding it would only gather it twice.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in (*model.layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    return model
