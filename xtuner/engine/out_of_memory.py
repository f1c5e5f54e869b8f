"""A run that does not fit says what it was doing, and leaves a file with what it held."""

from __future__ import annotations

import gc
import json
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from xtuner.config import TrainConfig
from xtuner.engine.metrics import peak_memory_gib
from xtuner.errors import OutOfMemoryError
from xtuner.parallel import World

# torch raises its own class only on accelerators.
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Turn a failed allocation inside into OutOfMemoryError, which names `phase`.

    Where the operating system promises more memory than it has, no allocation fails: it kills a process, and all that
    can be told of that is told by the launcher.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not (isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(e) for sign in _SIGNS)):
            raise
        raise OutOfMemoryError(phase, _wanted(str(e))) from e


def _wanted(message: str) -> str:
    """What could not be had, of torch's message on CPU ("tried to allocate 8 bytes") or CUDA ("8.00 MiB")."""
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", message, re.IGNORECASE)
    if found is None:
        return "an allocation failed"
    amount, unit = found.groups()
    return f"cannot allocate {int(amount) / 2**20:,.2f} MiB" if unit == "bytes" else f"cannot allocate {amount} {unit}"


def resident_bytes(device: torch.device) -> int:
    """What a process holds beside its tensors as a part of `peak_memory_gib`; to be asked before there are any."""
    return 0 if device.type == "cuda" else psutil.Process().memory_info().rss


def leave_snapshot(
    error: OutOfMemoryError,
    cfg: TrainConfig,
    world: World,
    step: int | None,
    optimizer: torch.optim.Optimizer | None,
    resident: int,
) -> None:
    """Write `<run_dir>/out_of_memory/rank-<r>.json`, on CUDA also what torch knows of every block (`.pickle`, for
    https://pytorch.org/memory_viz), and tell `error` about it.

    Args:
        step: the one that failed, from 1; None: before the first.
        optimizer: None while there is none.
        resident: what was held before there were tensors.
    """
    path = snapshot_file(cfg.run_dir, world.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = held_bytes(optimizer, world.device)
    peak = int(peak_memory_gib(world.device) * 2**30) - resident
    snapshot = {
        "phase": error.phase,
        "step": step,
        "rank": world.rank,
        "num_ranks": world.size,
        "device": world.device.type,
        "error": str(error.__cause__),
        "peak_bytes": peak,
        "bytes": held | {"activations": max(0, peak - sum(held.values()))},
        "config": cfg.model_dump(mode="json"),
    }
    path.write_text(json.dumps(snapshot, indent=1) + "\n")
    if world.device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
    error.locate(step, world.rank, path)


def snapshot_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "out_of_memory" / f"rank-{rank}.json"


def held_bytes(optimizer: torch.optim.Optimizer | None, device: torch.device) -> dict[str, int]:
    """This rank's bytes of sharded weights, gradients and optimizer state on `device`.

    The optimizer knows the shards; a module has the gathered weights in their place while it computes.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    state = [value for p in params for value in optimizer.state.get(p, {}).values() if isinstance(value, Tensor)]
    gradients = [p.grad for p in params if p.grad is not None]
    tensors = {"parameters": params, "gradients": gradients, "optimizer": state}
    return {kind: sum(_bytes_on(device, x) for x in some) for kind, some in tensors.items()}


def _bytes_on(device: torch.device, x: Tensor) -> int:
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.nbytes if local.device.type == device.type else 0


def release(error: OutOfMemoryError) -> None:
    """Give back what the frames of the failed step still hold; their lines stay in the traceback."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
