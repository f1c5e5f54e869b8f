"""Ranks that reach each other's GPU memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops.ep import AllGather, EpGroup

INDEX_BYTES = 1 << 16  # the loads of 2^14 experts
_ALIGN = 256

MakeMemory = Callable[[int], tuple[Tensor, list[int]]]


class DeviceEpGroup(EpGroup):
    """Ranks with a GPU each, which see each other's memory. Ops of a group must all be on one stream of a rank.

    Args:
        rank, world_size: this process in the group.
        all_gather: called with bytes on every rank, returns those of all ranks in rank order.
        make_memory: called with the same number of bytes on every rank; returns this rank's memory, a uint8 tensor of
            that length, and the addresses by which this rank reaches everybody's, its own among them.
        timeout_s: how long a rank is waited for on the GPU. One that does not come is noted there, by name, for
            `raise_faults` to raise; after that nobody is waited for.

    Rows lie in the shared memory only while an op needs them there, so it need not be large: ops use its two halves in
    turn, and a rank that has been through the exchanges of the next op has been waited for by, and has waited for, all
    that read or wrote its half in the last. (A captured CUDA graph must therefore begin with `ep_prepare`.)
    """

    must_reserve = True

    def __init__(
        self,
        rank: int,
        world_size: int,
        all_gather: AllGather,
        make_memory: MakeMemory,
        device: torch.device,
        timeout_s: float = 300.0,
    ):
        super().__init__(rank, world_size)
        self.device, self.timeout_s = device, timeout_s
        self._all_gather, self._make_memory = all_gather, make_memory
        self._memory: Tensor | None = None
        self._half_bytes, self._turn = -1, 0
        self.reserve(0)

    def reserve(self, num_bytes: int) -> None:
        """When more is asked for than before, all ranks wait for each other and for their GPUs, and take new memory."""
        half_bytes = -(-num_bytes // _ALIGN) * _ALIGN
        if half_bytes <= self._half_bytes:
            return
        self._wait_for_all(half_bytes)  # nobody uses the old memory any more
        self._memory = None
        front = _C.signal_bytes + 2 * INDEX_BYTES
        self._memory, addresses = self._make_memory(front + 2 * half_bytes)
        self._memory[: _C.signal_bytes].zero_()
        self._wait_for_all(half_bytes)  # nobody signals before the pages are clean
        self.peers = _C.Peers(self.rank, addresses, INDEX_BYTES, 2 * half_bytes, self.timeout_s)
        self._halves = self._memory[front:].chunk(2) if half_bytes else (self._memory[front:],) * 2
        self._half_bytes = half_bytes

    def _wait_for_all(self, half_bytes: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        asked = [int(reply) for reply in self._all_gather(str(half_bytes).encode())]
        if len(set(asked)) != 1:
            raise _C.Error(f"EpGroup.reserve: num_bytes must be the same on all ranks, got {asked} in rank order")

    def next_area(self) -> _Half:
        self._turn ^= 1
        return _Half(self._halves[self._turn], self.rank)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


class _Half:
    """Hands out one half of the data area from its begin on."""

    def __init__(self, memory: Tensor, rank: int):
        self._left, self._rank = memory, rank

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > self._left.numel():
            raise _C.Error(
                f"ep: rank {self._rank} needs {num_bytes} bytes for {list(shape)} {dtype} in the memory its group "
                f"shares, where {self._left.numel()} are left: call EpGroup.reserve on all ranks first"
            )
        piece = self._left[:num_bytes]
        self._left = self._left[-(-num_bytes // _ALIGN) * _ALIGN :]
        return piece.view(dtype).view(tuple(shape))

    def share(self, x: Tensor) -> Tensor:
        return self.empty(x.shape, x.dtype).copy_(x)

    def keep(self, x: Tensor) -> Tensor:
        return x.clone()
