"""Which rows of a sharded parameter this rank holds, and the whole of it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_rows(param: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a plain parameter or one sharded along dim 0, and the global index of the first of them."""
    if not isinstance(param, DTensor):
        return param.detach(), 0
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if tuple(shape[1:]) != tuple(param.shape[1:]):
        raise ValueError(f"parameter sharded along another dim than 0: {param.placements}")
    return param.detach().to_local(), offset[0]


def whole(value: Tensor) -> Tensor:
    """The whole of a plain or sharded tensor, without gradient, on every rank. Collective for a DTensor."""
    value = value.detach()
    if not isinstance(value, DTensor):
        return value
    # Axis by axis: experts are sharded over the inner axis first, and torch warns about gathering both at once.
    placements = list(value.placements)
    for axis in range(len(placements)):
        placements[axis] = Replicate()
        value = value.redistribute(placements=placements)
    return value.to_local()
