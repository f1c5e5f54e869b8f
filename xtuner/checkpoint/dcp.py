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
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
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
    """Write `<root>/step-<step>` and return when it is complete; see `CheckpointWriter`. Collective."""
    return CheckpointWriter(root, keep_last).save(step, model, optimizer, state)


class CheckpointWriter:
    """Writes checkpoints below `root` and keeps the `keep_last` newest. Made collectively.

    Args:
        background: `save` copies the state to CPU memory and returns; a thread of every rank writes the copy while
            training goes on. Otherwise `save` returns when the checkpoint is complete.
    """

    def __init__(self, root: Path, keep_last: int, background: bool = False):
        self.root, self.keep_last = root, keep_last
        self._pending: Future[str | None] | None = None
        self._group = None
        if background:
            self._group = dist.new_group(backend="gloo")  # training has the other groups for itself
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
        """Write `<root>/step-<step>` from all ranks, each its own shards, after any earlier save. Collective.

        Args:
            state: JSON-able facts to come back from `load_checkpoint`; must hold "arch" (the model's architecture).

        Raises:
            CheckpointError: on every rank, when any rank could not write; in the background, that was the save before
                this one. Earlier checkpoints are untouched.
        """
        self.wait()
        final = self.root / f"step-{step:08d}"
        partial = self.root / f"{final.name}.partial"
        facts = json.dumps({**state, "world_size": _world_size()}, indent=1)
        _on_main(lambda: _make_empty(self.root, partial), f"cannot create {partial}")
        tensors = _tensors(model, optimizer)
        if self._group is None:
            _agree(self._write(tensors, partial, final, facts))
        else:
            self._pending = self._thread.submit(self._write, self._stager.stage(tensors), partial, final, facts)
        return final

    def wait(self) -> None:
        """Until the save under way, if there is one, is complete. Collective. Raises CheckpointError as `save`."""
        if self._pending is not None:
            problem, self._pending = self._pending.result(), None
            _agree(problem)

    def _write(self, tensors: dict[str, Any], partial: Path, final: Path, facts: str) -> str | None:
        """What went wrong, or None. Once torch's save returns, every rank has written."""
        try:
            dcp.save(tensors, checkpoint_id=partial, process_group=self._group)
        except (CheckpointException, OSError, RuntimeError) as e:
            if _rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            return f"{final}: not saved, {_cause(e)}; {_survivor(self.root)}"
        if _rank() == 0:
            try:
                _publish(partial, final, facts)
                _prune(self.root, self.keep_last)
            except OSError as e:
                return f"{final}: not saved: {e}; {_survivor(self.root)}"
        return None


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, arch: dict[str, Any]
) -> dict[str, Any]:
    """Restore model, optimizer and random state in place; return the `state` that was saved. Collective.

    The number of ranks may differ from that of the save; then each rank keeps its own fresh random state.

    Raises:
        CheckpointError: `path` is no complete checkpoint, or one of another architecture than `arch`.
    """
    state = read_state(path)
    _check_same_model(path, state["arch"], arch)
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = _tensors(model, optimizer)
    if f"rng.rank{_rank()}" not in saved or state["world_size"] != _world_size():
        tensors.pop("rng", None)
    try:
        dcp.load(tensors, checkpoint_id=path)
    except (CheckpointException, OSError, RuntimeError) as e:
        raise CheckpointError(f"{path}: cannot be read, {_cause(e)}") from e
    set_state_dict(
        model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optim"], options=_BY_NAME
    )
    if "rng" in tensors:
        torch.set_rng_state(tensors["rng"][f"rank{_rank()}"])
    return state


def read_model(path: Path, names: Sequence[str], max_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors `names` of a saved model, in order, at most `max_bytes` of them (or one) read at a time.

    Not collective. Drop each tensor before asking for the next, and no more than that is ever in memory.

    Raises:
        CheckpointError: a name is not there, or the checkpoint cannot be read.
    """
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    missing = [name for name in names if f"model.{name}" not in saved]
    if missing:
        raise CheckpointError(f"{path}: holds no parameter {missing[0]} ({len(missing)} of {len(names)} are missing)")
    waiting = [(name, saved[f"model.{name}"]) for name in reversed(names)]
    while waiting:
        batch: dict[str, Tensor] = {}
        while waiting and (not batch or _num_bytes(batch.values()) + _bytes_of(waiting[-1][1]) <= max_bytes):
            name, facts = waiting.pop()
            batch[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch tells that it reads in one process
                dcp.load({"model": batch}, checkpoint_id=path, no_dist=True)
        except (CheckpointException, OSError, RuntimeError) as e:
            raise CheckpointError(f"{path}: cannot be read, {_cause(e)}") from e
        for name in list(batch):
            yield name, batch.pop(name)


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


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.dtype.itemsize for t in tensors)


def _bytes_of(facts: TensorStorageMetadata) -> int:
    return facts.size.numel() * facts.properties.dtype.itemsize


def _make_empty(root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for stale in (*root.glob("*.partial"), *root.glob("*.deleting")):
        shutil.rmtree(stale)
    partial.mkdir()


def _publish(partial: Path, final: Path, facts: str) -> None:
    with open(partial / _STATE_FILE, "w") as f:
        f.write(facts)
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


def _on_main(action: Callable[[], None], what: str) -> None:
    """Run `action` on rank 0; raise a CheckpointError on every rank if it failed there."""
    problem = None
    if _rank() == 0:
        try:
            action()
        except OSError as e:
            problem = f"{what}: {e}"
    _agree(problem)


def _agree(problem: str | None) -> None:
    """Raise a CheckpointError on every rank if any has a problem."""
    problems = [problem] * _world_size()
    if _world_size() > 1:
        dist.all_gather_object(problems, problem)
    for text in problems:
        if text:
            raise CheckpointError(text)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
