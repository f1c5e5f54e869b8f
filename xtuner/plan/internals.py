"""What the planner uses of torch that torch does not promise to keep, in this one place, and a check of it."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from xtuner.errors import ConfigError

KNOWN = "2.13"  # the release that all of this was written for and tested with


def _changed(what: object) -> ConfigError:
    return ConfigError(
        f"plan: torch {torch.__version__} differs from torch {KNOWN} inside, where the planner watches FSDP2 and "
        f"DTensor ({what}); plan with torch {KNOWN}, which need not be the one you train with"
    )


try:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed._tools.fake_collectives import CollectiveOp, non_functional_collectives, sync_ops
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError as error:
    raise _changed(error) from error

# Replaced while a plan is made. FSDP2 fills its buffers between unshard and wait_for_unshard, makes gradients in
# post_backward and cuts parameters by _chunk_with_empty; meshes are about real numbers, in fake mode too; DTensor
# finds out shapes by running operators on fake tensors of global shape.
FSDP_STEPS = ("unshard", "wait_for_unshard", "post_backward")
MESH_METHODS = ("__init__", "_concatenate", "_flatten", "__getitem__")
SHAPE_FINDERS = ("propagate", "_propagate_tensor_meta_non_cached")
_REPLACED = (
    (FSDPParamGroup, FSDP_STEPS),
    (_fsdp_param, ("_chunk_with_empty",)),
    (DeviceMesh, MESH_METHODS),
    (ShardingPropagator, SHAPE_FINDERS),
)


def check_internals() -> None:
    """Raises ConfigError, naming torch's version, if something is gone that would be replaced."""
    for owner, names in _REPLACED:
        for name in names:
            if not hasattr(owner, name):
                raise _changed(f"{owner.__name__} has no {name}")


__all__ = [
    "FSDP_STEPS", "MESH_METHODS", "SHAPE_FINDERS", "AsyncCollectiveTensor", "CollectiveOp", "FSDPParamGroup",
    "FakeStore", "ShardingPropagator", "_compute_local_shape_and_global_offset", "_fsdp_param", "check_internals",
    "non_functional_collectives", "sync_ops",
]  # fmt: skip
