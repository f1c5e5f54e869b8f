"""The processes of a run: who we are, where we compute, and the few collectives the engine itself needs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner import _C
from xtuner.errors import ConfigError

# Long enough for rank 0 to tokenise a large data set while the others wait.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """One rank's view of the run."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, without gradient. Returns a new tensor of the same shape."""
        total = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether any rank raised `flag`."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item())

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def init_world(device: str, num_threads: int | None) -> World:
    """Join the process group described by the launcher's environment, or be a group of one without it.

    Args:
        device: "auto", "cpu" or "cuda".
        num_threads: CPU threads of this rank; None divides the cores among the local ranks.

    Raises:
        ConfigError: cuda was asked for and there is none, or fewer GPUs than local ranks.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = _choose_device(device, local_size)
    torch.set_num_threads(num_threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    else:
        _C.keep_freed_memory()  # what torch's caching allocator does on other devices
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return World(rank, local_rank, size, local_size, torch.device(kind, local_rank if kind == "cuda" else None))


def leave_world() -> None:
    """Destroy the process group and let gloo's threads come to rest, so that the interpreter may end.

    Such a thread takes the interpreter's lock to free the tensors of a finished collective. CPython before 3.14 ends a
    thread that asks for the lock while the interpreter ends by unwinding its stack, which torch's frames forbid: the
    process would abort with all its work done. The groups cannot be joined instead: caches of DTensor keep them alive.
    """
    dist.destroy_process_group()
    time.sleep(0.2)


def _choose_device(device: str, local_size: int) -> str:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device=cuda: torch sees no CUDA device; use device=cpu or device=auto")
    kind = "cuda" if available and device != "cpu" else "cpu"
    if kind == "cuda" and local_size > torch.cuda.device_count():
        raise ConfigError(f"--nproc={local_size} exceeds the {torch.cuda.device_count()} GPUs of this node")
    return kind
