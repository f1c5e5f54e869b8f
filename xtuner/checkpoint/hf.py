"""Exchange with Hugging Face: safetensors in and out, streamed, so that no two copies of a model are ever in memory.

The name map (our parameter -> the checkpoint tensors stacked in it) comes in as data; see models/hf_map.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from xtuner.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*", "added_tokens*")
_TIED_HEAD = "lm_head.weight"

Parts = dict[str, list]  # our name -> [(hf_name, row_start, num_rows), …]


@torch.no_grad()
def load_hf(model: nn.Module, name_map: Parts, path: Path | str) -> None:
    """Fill the parameters of `model` (plain, or sharded along dim 0) from a Hugging Face directory.

    A rank reads only the rows of its own shard, tensor by tensor, and casts them to the parameter's dtype.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, left over or of another shape.
    """
    with ExitStack() as stack:
        files = _open_all(Path(path), stack)
        _check_names(path, name_map, files)
        for name, param in model.named_parameters():
            local, first_row = _local_rows(param)
            for hf_name, row_start, num_rows in name_map[name]:
                _check_shape(hf_name, files[hf_name], (num_rows, *param.shape[1:]))
                lower = max(row_start, first_row)
                upper = min(row_start + num_rows, first_row + local.shape[0])
                if lower < upper:
                    rows = files[hf_name].slice[lower - row_start : upper - row_start]
                    local[lower - first_row : upper - first_row] = rows


def save_hf(
    model: nn.Module,
    name_map: Parts,
    path: Path | str,
    *,
    config: dict[str, Any],
    dtype: torch.dtype,
    tokenizer_dir: Path | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write `model` as a directory that transformers loads. Collective: parameters are gathered one at a time.

    Rank 0 holds at most one file's tensors (`max_shard_bytes`, or one parameter if that is larger). The directory
    appears under its name only when complete; an older one of that name stays until then.

    Raises:
        CheckpointError: on every rank, when rank 0 could not write.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if not is_main:
        for _ in _gathered(model, name_map, dtype):
            pass
        _share_outcome(None, path)
        return
    problem = None
    tensors = _gathered(model, name_map, dtype)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_shards(tensors, partial, max_shard_bytes)
        _write_side_files(partial, config | {"dtype": str(dtype).removeprefix("torch.")}, tokenizer_dir)
        _replace(partial, path)
    except (OSError, SafetensorError) as e:
        problem = f"{path}: not exported, {e}"
        shutil.rmtree(partial, ignore_errors=True)
        for _ in tensors:  # the other ranks are still taking part in the gathers
            pass
    _share_outcome(problem, path)


class _Entry:
    """One tensor of the checkpoint: where it lies, and a lazy handle to its rows."""

    def __init__(self, file: Path, handle: Any, name: str):
        self.file = file
        self.slice = handle.get_slice(name)
        self.shape = tuple(self.slice.get_shape())


def _open_all(path: Path, stack: ExitStack) -> dict[str, _Entry]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    entries: dict[str, _Entry] = {}
    for file in _files(path):
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{file}: named by {_INDEX}, but not there") from None
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file}: damaged or truncated safetensors file ({e})") from None
        entries |= {name: _Entry(file, handle, name) for name in handle.keys()}
    return entries


def _files(path: Path) -> list[Path]:
    index = path / _INDEX
    if index.exists():
        try:
            return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise CheckpointError(f"{index}: not a safetensors index ({e!r})") from None
    if (path / _SINGLE).exists():
        return [path / _SINGLE]
    raise CheckpointError(f"{path}: has neither {_SINGLE} nor {_INDEX}")


def _check_names(path: Path | str, name_map: Parts, files: dict[str, _Entry]) -> None:
    wanted = {hf_name for parts in name_map.values() for hf_name, *_ in parts}
    missing, extra = sorted(wanted - files.keys()), sorted(files.keys() - wanted)
    if extra == [_TIED_HEAD]:  # tied models may be saved with the head spelled out
        extra = []
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} tensors are missing: {_some(missing)}")
    if extra:
        raise CheckpointError(f"{path}: {len(extra)} tensors do not belong to this model: {_some(extra)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _check_shape(name: str, entry: _Entry, expected: tuple[int, ...]) -> None:
    if entry.shape != expected:
        raise CheckpointError(
            f"{entry.file}: {name} has shape {list(entry.shape)}, this model needs {list(expected)}"
        )


def _local_rows(param: nn.Parameter) -> tuple[Tensor, int]:
    """This rank's rows of `param`, and the global index of the first."""
    if not isinstance(param, DTensor):
        return param.data, 0
    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return param.to_local(), offset[0]


@torch.no_grad()
def _gathered(model: nn.Module, name_map: Parts, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(hf name, tensor on CPU) in the order of the parameters, gathering each parameter when its turn comes."""
    for name, param in model.named_parameters():
        full = param.full_tensor() if isinstance(param, DTensor) else param.data
        full = full.to(device="cpu", dtype=dtype)
        for hf_name, row_start, num_rows in name_map[name]:
            yield hf_name, full[row_start : row_start + num_rows]


def _write_shards(tensors: Iterator[tuple[str, Tensor]], directory: Path, max_shard_bytes: int) -> None:
    """Fill file after file; their final names, which hold their number, are known only at the end."""
    shard: dict[str, Tensor] = {}
    names_by_shard: list[list[str]] = []
    sizes = [0]

    def flush() -> None:
        save_file(shard, directory / f"shard-{len(names_by_shard)}", metadata={"format": "pt"})
        names_by_shard.append(list(shard))
        shard.clear()
        sizes.append(0)

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and sizes[-1] + size > max_shard_bytes:
            flush()
        shard[name] = tensor.clone()  # its own storage: a view would keep the whole parameter alive
        sizes[-1] += size
    flush()
    _name_shards(directory, names_by_shard, sum(sizes))


def _name_shards(directory: Path, names_by_shard: list[list[str]], total_size: int) -> None:
    count = len(names_by_shard)
    if count == 1:
        (directory / "shard-0").rename(directory / _SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(names_by_shard):
        final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        (directory / f"shard-{i}").rename(directory / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=1))


def _write_side_files(directory: Path, config: dict[str, Any], tokenizer_dir: Path | None) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
    (directory / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")
    for pattern in _TOKENIZER_FILES if tokenizer_dir else ():
        for file in Path(tokenizer_dir).glob(pattern):
            if file.is_file():
                shutil.copy(file, directory)


def _replace(partial: Path, path: Path) -> None:
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _share_outcome(problem: str | None, path: Path) -> None:
    """Raise rank 0's failure on every rank."""
    outcome = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise CheckpointError(outcome[0])
