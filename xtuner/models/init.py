"""Fresh weights that do not depend on how the model is sharded."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Rows drawn from one generator: a rank draws only the blocks its shard touches.
BLOCK_ROWS = 256


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, std: float) -> None:
    """Matrices normal(0, std), norm scales 1, biases 0. A parameter's values depend on (seed, its name) alone."""
    for name, param in model.named_parameters():
        local, first_row = _local_rows(param)
        if param.ndim >= 2:
            _fill_normal(local, first_row, param.shape, seed, name, std)
        else:
            local.fill_(0.0 if name.endswith("bias") else 1.0)


def _local_rows(param: nn.Parameter) -> tuple[Tensor, int]:
    """This rank's part of `param` and the global index of its first row."""
    if not isinstance(param, DTensor):
        return param.data, 0
    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return param.to_local(), offset[0]


def _fill_normal(local: Tensor, first_row: int, shape: torch.Size, seed: int, name: str, std: float) -> None:
    last_row = first_row + local.shape[0]
    for block in range(first_row // BLOCK_ROWS, (last_row + BLOCK_ROWS - 1) // BLOCK_ROWS):
        start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, shape[0])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{block}".encode()))
        values = torch.empty(stop - start, *shape[1:]).normal_(0.0, std, generator=generator)
        lower, upper = max(start, first_row), min(stop, last_row)
        local[lower - first_row : upper - first_row] = values[lower - start : upper - start]
