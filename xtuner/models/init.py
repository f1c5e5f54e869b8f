"""Fresh weights that do not depend on how the model is sharded."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from xtuner.parallel import local_rows

# Rows drawn from one generator: a rank draws only the blocks its shard touches.
BLOCK_ROWS = 256


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, std: float) -> None:
    """Matrices normal(0, std), norm scales 1, biases 0, buffers 0. A parameter's values depend on (seed, its name)."""
    for buffer in model.buffers():  # the routers' choice biases
        buffer.zero_()
    for name, param in model.named_parameters():
        local, first_row = local_rows(param)
        if param.ndim >= 2:
            _fill_normal(local, first_row, param.shape, seed, name, std)
        else:
            local.fill_(0.0 if name.endswith("bias") else 1.0)


def _fill_normal(local: Tensor, first_row: int, shape: torch.Size, seed: int, name: str, std: float) -> None:
    last_row = first_row + local.shape[0]
    for block in range(first_row // BLOCK_ROWS, (last_row + BLOCK_ROWS - 1) // BLOCK_ROWS):
        start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, shape[0])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{block}".encode()))
        values = torch.empty(stop - start, *shape[1:]).normal_(0.0, std, generator=generator)
        lower, upper = max(start, first_row), min(stop, last_row)
        local[lower - first_row : upper - first_row] = values[lower - start : upper - start]
