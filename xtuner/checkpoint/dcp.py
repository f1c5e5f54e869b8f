"""Sharded checkpoints to resume from: torch's distributed checkpoint plus one small JSON file, made visible atomically.

    <root>/step-00000100/           complete: it got this name by a rename, after everything in it was on disk
        .metadata, *.distcp         model, optimizer and random state, keyed by plain module names with global shapes
        state.json                  step, data position, counters, architecture
    <root>/step-00000200.partial/   a save that was interrupted; never read, removed by the next save
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from xtuner.errors import CheckpointError

_COMPLETE = re.compile(r"step-\d{8}")
_STATE_FILE = "state.json"
# Optimizer state by parameter name: how parameters are grouped depends on the layout.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest first."""
    found = [p for p in root.glob("step-*") if _COMPLETE.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found)


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep_last: int
) -> Path:
    """Write `<root>/step-<step>` from all ranks, then drop all but the `keep_last` newest. Collective.

    Args:
        state: JSON-able facts to come back from `load_checkpoint`; must hold "arch" (the model's architecture).

    Raises:
        CheckpointError: on every rank, when any rank could not write. Earlier checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    partial = root / f"{final.name}.partial"
    _on_main(lambda: _make_empty(root, partial), f"cannot create {partial}")
    try:
        dcp.save(_tensors(model, optimizer), checkpoint_id=partial)
    except (CheckpointException, OSError, RuntimeError) as e:
        _on_main(lambda: shutil.rmtree(partial, ignore_errors=True), f"cannot remove {partial}")
        raise CheckpointError(f"{final}: not saved, {_cause(e)}; {_survivor(root)}") from e
    _on_main(lambda: _publish(partial, final, state), f"{final}: not saved", root)
    _on_main(lambda: _prune(root, keep_last), f"cannot prune {root}")
    return final


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, arch: dict[str, Any]
) -> dict[str, Any]:
    """Restore model, optimizer (unless None) and random state in place; return the `state` that was saved. Collective.

    The number of ranks may differ from that of the save; then each rank keeps its own fresh random state.

    Raises:
        CheckpointError: `path` is no complete checkpoint, or one of another architecture than `arch`.
    """
    state = read_state(path)
    _check_same_model(path, state["arch"], arch)
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    if optimizer is None:
        tensors = {"model": get_state_dict(model, ())[0]}
    else:
        tensors = _tensors(model, optimizer)
    if f"rng.rank{_rank()}" not in saved or state["world_size"] != _world_size():
        tensors.pop("rng", None)
    try:
        dcp.load(tensors, checkpoint_id=path)
    except (CheckpointException, OSError, RuntimeError) as e:
        raise CheckpointError(f"{path}: cannot be read, {_cause(e)}") from e
    if optimizer is None:
        model.load_state_dict(tensors["model"])
        return state
    set_state_dict(
        model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optim"], options=_BY_NAME
    )
    if "rng" in tensors:
        torch.set_rng_state(tensors["rng"][f"rank{_rank()}"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises CheckpointError when it is not there."""
    try:
        return json.loads((path / _STATE_FILE).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: not a complete checkpoint ({e})") from None


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_BY_NAME)
    rng = {f"rank{_rank()}": torch.get_rng_state()}
    return {"model": model_state, "optim": optimizer_state, "rng": rng}


def _make_empty(root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for stale in (*root.glob("*.partial"), *root.glob("*.deleting")):
        shutil.rmtree(stale)
    partial.mkdir()


def _publish(partial: Path, final: Path, state: dict[str, Any]) -> None:
    with open(partial / _STATE_FILE, "w") as f:
        json.dump({**state, "world_size": _world_size()}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    _fsync_directory(partial)
    if final.exists():  # the step was saved before, by the run this one continues
        _remove(final)
    partial.rename(final)
    _fsync_directory(final.parent)


def _prune(root: Path, keep_last: int) -> None:
    for old in list_checkpoints(root)[:-keep_last]:
        _remove(old)


def _remove(path: Path) -> None:
    # Renamed first: a process killed halfway through rmtree must not leave something that looks complete.
    doomed = path.with_name(path.name + ".deleting")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_same_model(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [k for k in sorted({*saved, *wanted}) if saved.get(k) != wanted.get(k)]
    if differing:
        pairs = ", ".join(f"{k}={saved.get(k)!r} (this run: {wanted.get(k)!r})" for k in differing)
        raise CheckpointError(f"{path}: checkpoint of another model: {pairs}")


def _cause(error: BaseException) -> str:
    """The innermost message: DCP wraps each rank's exception."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {inner}"
    return str(error)


def _survivor(root: Path) -> str:
    complete = list_checkpoints(root)
    return f"the previous checkpoint {complete[-1]} is intact" if complete else "there is no earlier checkpoint"


def _on_main(action: Callable[[], None], what: str, root: Path | None = None) -> None:
    """Run `action` on rank 0; raise a CheckpointError on every rank if it failed there."""
    problem: list[str | None] = [None]
    if _rank() == 0:
        try:
            action()
        except OSError as e:
            problem = [f"{what}: {e}" + (f"; {_survivor(root)}" if root else "")]
    if _world_size() > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(problem[0])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
