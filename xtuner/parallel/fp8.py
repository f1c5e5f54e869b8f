"""Weights of float8 layers travel as float8: each rank quantizes its rows, and FSDP2 gathers codes and scales.

A gather moves a quarter of float32's bytes, half of bfloat16's, and the codes are those of the whole weight, bit for
bit, wherever it is cut. Master weights stay what they are. FSDP2 lets a sharded tensor say how it is gathered; it asks
the tensor object for two functions, so a plain tensor that carries them does as well as a subclass and needs no
arithmetic, checkpoint and optimizer of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from xtuner import ops
from xtuner.errors import ConfigError

BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_EPS = 1e-12  # floor of a block's largest value, as in `ops.quantize_128x128`


def gather_in_fp8(model: nn.Module) -> None:
    """Let the matrices of modules with `fp8` set be gathered in float8. After the shards have memory.

    Raises:
        ConfigError: a weight whose rows do not divide among its ranks.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for param in group.fsdp_params:
                owner, name = param._module_info.module, param._module_info.param_name
                if getattr(owner, "fp8", False) and len(param._orig_size) == 2:
                    _announce(param, f"{type(owner).__name__}.{name}")


def _announce(param: Any, name: str) -> None:
    """Give the shard of FSDP2's `param` its two functions."""
    shard, rows = param._sharded_local_tensor, param._orig_size[0]
    if rows % shard.shape[0]:
        raise ConfigError(
            f"fp8.enabled=true: the {rows} rows of {name} do not divide among the ranks that share them; choose "
            "another parallel.shard_size, or train in bfloat16 (fp8.enabled=false)"
        )
    shard.fsdp_pre_all_gather = partial(_before_gather, shard)
    shard.fsdp_post_all_gather = _after_gather
    param._init_extensions()


def _before_gather(
    shard: Tensor, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: tuple, module: nn.Module, mp_policy: Any
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """What is gathered, as bytes, and the scales when every rank has them all already."""
    if shard.shape[0] % BLOCK == 0:
        codes, _, scale = (t[0] for t in ops.quantize_128x128(shard[None]))
        if mesh.size() == 1:  # FSDP2 then takes one tensor only
            return (codes.view(torch.uint8),), scale
        return (codes.view(torch.uint8), scale.view(torch.uint8)), None
    codes, scale = _quantize_cut(shard, outer_size[0], mesh)
    return (codes.view(torch.uint8),), scale


def _quantize_cut(shard: Tensor, num_rows: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Codes of this rank's rows and all scales, where ranks share blocks of 128 rows."""
    rows = mesh.get_local_rank() * shard.shape[0] + torch.arange(shard.shape[0], device=shard.device)
    block_of_row = rows // BLOCK
    largest = shard.abs().unflatten(1, (-1, BLOCK)).amax(-1)
    scale = largest.new_zeros(num_rows // BLOCK, largest.shape[1])
    scale.index_reduce_(0, block_of_row, largest, "amax")
    dist.all_reduce(scale, dist.ReduceOp.MAX, group=mesh.get_group())
    scale = scale.clamp_min(_EPS) / _LARGEST
    inverse = (1 / scale)[block_of_row].repeat_interleave(BLOCK, 1)
    return (shard * inverse).to(torch.float8_e4m3fn), scale


def _after_gather(
    gathered: tuple[Tensor, ...], scale: Tensor | None, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The weight of all rows; or, from the second time on, `out` made valid again, whose codes are `gathered`."""
    if out is not None:
        weight = out._local_tensor if isinstance(out, DTensor) else out
        if scale is not None:
            weight.scale.copy_(scale)
        return None
    if scale is None:
        scale = gathered[1].view(torch.float32)
    return ops.Float8Weight(gathered[0].view(torch.float8_e4m3fn), scale, dtype), ()
