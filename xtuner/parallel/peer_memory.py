"""The memory that an expert-parallel group shares: of one machine on CPUs, of GPUs that reach each other otherwise."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from xtuner import ops
from xtuner.ops import OpError

INSTEAD = "use parallel.dispatcher=all_to_all"


def make_group(process_group: dist.ProcessGroup | None, device: torch.device, timeout_s: float) -> ops.EpGroup:
    """Collective.

    Raises:
        OpError: on every rank, where ranks cannot reach each other's memory; names two of them and what to use instead.
    """
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def all_gather(mine: bytes) -> list[bytes]:
        gathered: list[bytes] = [b""] * world_size
        dist.all_gather_object(gathered, mine, group=process_group)
        return gathered

    if device.type == "cpu":
        return ops.HostEpGroup(rank, world_size, all_gather, timeout_s)
    check_reach([pickle.loads(place) for place in all_gather(pickle.dumps(_place(device)))])

    def make_memory(num_bytes: int) -> tuple[Tensor, list[int]]:
        memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        try:
            handle = symmetric_memory.rendezvous(memory, process_group or dist.group.WORLD)
        except RuntimeError as error:
            raise OpError(f"dispatcher=fused: torch cannot share memory between the group's GPUs; {INSTEAD}") from error
        # `memory` keeps the handle's memory alive here, the handle that of the other ranks.
        memory.peer_handle = handle
        return memory, [int(address) for address in handle.buffer_ptrs]

    return ops.DeviceEpGroup(rank, world_size, all_gather, make_memory, device, timeout_s)


class Place(NamedTuple):
    """Where a rank computes; `reaches` are the GPUs of its machine whose memory its own GPU can address."""

    host: str
    gpu: str
    reaches: frozenset[str]


def _place(device: torch.device) -> Place:
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    reach = frozenset(
        uuid
        for i, uuid in enumerate(uuids)
        if i == device.index or torch.cuda.can_device_access_peer(device.index, i)
    )
    return Place(socket.gethostname(), uuids[device.index], reach)


def check_reach(places: Sequence[Place]) -> None:
    """`places` in rank order."""
    for rank, here in enumerate(places):
        for other, there in enumerate(places[:rank]):
            who = f"dispatcher=fused: ranks {other} and {rank} of an expert-parallel group"
            if here.host != there.host:
                raise OpError(f"{who} are on two machines, {there.host} and {here.host}; {INSTEAD}")
            if here.gpu == there.gpu:
                raise OpError(f"{who} are on one GPU, {here.gpu}; give each rank its own, or {INSTEAD}")
            if there.gpu not in here.reaches or here.gpu not in there.reaches:
                raise OpError(
                    f"{who} have GPUs that cannot read each other's memory (no NVLink or PCIe peer access, or hidden "
                    f"by CUDA_VISIBLE_DEVICES); {INSTEAD}"
                )
