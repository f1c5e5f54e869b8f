"""Directories of safetensors files, read by slices and written as a stream.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets"}}, then the tensors' bytes end to end. Reading goes through the library.
Writing does not, because it wants all tensors of a file in memory at once, where a stream needs only one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xtuner.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk, and what the file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face directory, by name. Reads headers only, but of every file, so damage shows here.

    Raises:
        CheckpointError: no such directory, no weights in it, an unreadable index or file, or an index that names a
            file or tensor which is not there.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if (directory / INDEX_FILE).is_file():
        return _read_indexed(directory)
    if not (directory / SINGLE_FILE).is_file():
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}, only {found}")
    return _header(directory / SINGLE_FILE)


def _read_indexed(directory: Path) -> dict[str, StoredTensor]:
    index_file = directory / INDEX_FILE
    weight_map = _read_weight_map(index_file)
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        file = directory / name
        if file.parent != directory or not file.is_file():
            raise CheckpointError(f"{index_file}: names the file {name}, which is not in {directory}")
        header = _header(file)
        for tensor in (t for t, f in weight_map.items() if f == name):
            if tensor not in header:
                raise CheckpointError(f"{index_file}: says that {tensor} is in {name}, but it is not")
            tensors[tensor] = header[tensor]
    return tensors


def _read_weight_map(index_file: Path) -> dict[str, str]:
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{index_file}: truncated or malformed JSON ({e})") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_file}: must hold an object `weight_map` from tensor names to file names")
    return weight_map


def _header(file: Path) -> dict[str, StoredTensor]:
    with open_file(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}
        return {name: StoredTensor(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


@contextmanager
def open_file(file: Path) -> Iterator[Any]:
    """A safetensors handle with `keys()` and `get_slice(name)`. Raises CheckpointError naming the damaged file."""
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file}: truncated or damaged safetensors file ({e})") from None


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def plan_files(tensors: Sequence[PlannedTensor], max_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Deal `tensors`, in order, to files of at most `max_bytes` (a larger tensor has a file of its own)."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


class StreamWriter:
    """Writes planned files into `directory`; tensors arrive one at a time, in the order of the plan.

    Every file is on disk (fsync) once the tensor that completes it was written. Raises OSError when it cannot write.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Sequence[PlannedTensor]]):
        self.directory = directory
        self._todo = iter([(name, tensor) for name, tensors in plan.items() for tensor in tensors])
        self._plan = plan
        self._file = None
        self._file_name = ""

    def write(self, name: str, tensor: Tensor) -> None:
        """tensor: of the planned shape and dtype, on any device."""
        file_name, planned = next(self._todo)
        if (name, tuple(tensor.shape), tensor.dtype) != (planned.name, planned.shape, planned.dtype):
            raise AssertionError(f"planned {planned}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        if file_name != self._file_name:
            self._begin(file_name)
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._file.write(data)

    def close(self) -> None:
        """Complete the last file. After an error: release it."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            file.flush()
            os.fsync(file.fileno())

    def _begin(self, file_name: str) -> None:
        self.close()
        self._file_name = file_name
        self._file = open(self.directory / file_name, "wb")
        self._file.write(_encode_header(self._plan[file_name]))


def write_index(directory: Path, plan: Mapping[str, Sequence[PlannedTensor]]) -> None:
    """The index that goes with more than one file; nothing for a single one."""
    if list(plan) == [SINGLE_FILE]:
        return
    total = sum(tensor.num_bytes for tensors in plan.values() for tensor in tensors)
    weight_map = {tensor.name: file for file, tensors in plan.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _encode_header(tensors: Sequence[PlannedTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the data in place, so it must be aligned
    return len(text).to_bytes(8, "little") + text
