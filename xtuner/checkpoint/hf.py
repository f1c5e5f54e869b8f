"""Exchange with Hugging Face: a module's parameters to and from a directory of safetensors, one tensor at a time.

How our names relate to theirs is handed in as data: for each of our parameters, in order, which of its rows are which
Hugging Face tensor. Parameters may be plain tensors or DTensors sharded on dim 0; a rank reads the rows it
owns and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xtuner.checkpoint.safetensors_io import (
    DTYPE_NAMES,
    PlannedTensor,
    StoredTensor,
    StreamWriter,
    open_file,
    plan_files,
    read_headers,
    write_index,
)
from xtuner.errors import CheckpointError
from xtuner.parallel import local_rows, whole


class Part(Protocol):
    """Rows [row_start, row_start + num_rows) of one of our parameters are the whole tensor `hf_name`."""

    hf_name: str
    row_start: int
    num_rows: int


NameMap = Mapping[str, Sequence[Part]]

# A model with tied embeddings has no head of its own, but some directories hold the shared weight under both names.
TIED_HEAD, TIED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Written by old versions of transformers; recomputed from the config.
DERIVED_SUFFIX = ".rotary_emb.inv_freq"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LISTED = 5  # names in an error message


def load_hf(module: nn.Module, name_map: NameMap, path: Path | str, *, strict: bool = True) -> None:
    """Fill the parameters of `module`, in place, from the Hugging Face directory `path`.

    Each rank reads its own rows only. Everything is checked before the first parameter changes, except that the disk
    can still fail. Values are cast to the parameter's dtype. Not collective.

    Args:
        name_map: our parameter names to their parts.
        strict: refuse a directory that holds tensors `name_map` does not mention.

    Raises:
        CheckpointError: directory or file missing or damaged; a tensor missing, unknown, or of a wrong shape or dtype;
            a head that differs from the embedding although the model ties them.
    """
    path = Path(path)
    params = _parameters(module, name_map)
    stored = read_headers(path)
    _check_names(name_map, stored, path, strict)
    for name, param in params.items():
        for part in name_map[name]:
            _check_tensor(part, param, stored[part.hf_name])
    _check_tied_head(name_map, stored, path)
    # File by file, so that no more than one is mapped into memory at a time.
    jobs: dict[Path, list[tuple[Tensor, Part]]] = defaultdict(list)
    for name, param in params.items():
        for part in name_map[name]:
            jobs[stored[part.hf_name].file].append((param, part))
    for file in sorted(jobs):
        with open_file(file) as handle, torch.no_grad():
            for param, part in jobs[file]:
                _read_part(handle, param, part)


def save_hf(
    module: nn.Module,
    name_map: NameMap,
    path: Path | str,
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    tokenizer_dir: Path | str | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write `module` as the Hugging Face directory `path`: weights, config.json, generation_config.json, tokenizer.

    Collective: all ranks gather one parameter at a time, rank 0 writes it. The directory appears under its name by a
    rename once it is complete; an earlier export of that name is replaced then and not before.

    Args:
        config: the contents of config.json; `dtype` is added.
        dtype: of the stored weights; None keeps each parameter's own.
        tokenizer_dir: directory whose tokenizer files (and generation_config.json, if any) are copied.
        max_shard_bytes: upper bound of one file, except that a tensor is never cut.

    Raises:
        CheckpointError: on every rank, when rank 0 cannot write (disk full, …), the tokenizer is not there, or `path`
            holds something that is no export. What was at `path` is untouched then.
    """
    params = _parameters(module, name_map)
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    stored_dtype = dtype or next(iter(params.values())).dtype
    values = ((name, whole(param.detach().to(stored_dtype))) for name, param in params.items())
    write_hf(shapes, values, name_map, path, config, stored_dtype, tokenizer_dir, max_shard_bytes)


def write_hf(
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterable[tuple[str, Tensor]],
    name_map: NameMap,
    path: Path | str,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    tokenizer_dir: Path | str | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """As `save_hf`, from a stream: `values` gives every parameter of `shapes`, whole, in that order, on every rank."""
    export = _Export(Path(path)) if _is_main() else None
    plan = plan_files(list(_planned(shapes, name_map, dtype)), max_shard_bytes)
    if export:
        export.attempt(export.begin, plan, config, dtype, Path(tokenizer_dir) if tokenizer_dir else None)
    for name, value in values:
        if export:
            for part in name_map[name]:
                export.attempt(export.write, part, value)
        del value  # before the next one is gathered or read
    if export:
        export.attempt(export.finish)
    problem = [export.problem if export else None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(problem[0])


class _Export:
    """What rank 0 does. After the first problem it does nothing more, so that the gathers of all ranks can run out."""

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.problem: str | None = None
        self._writer: StreamWriter | None = None

    def attempt(self, action, *args) -> None:
        if self.problem:
            return
        try:
            action(*args)
        except (OSError, CheckpointError) as e:
            intact = "; what was there before is intact" if self.path.exists() else ""
            self.problem = str(e) if isinstance(e, CheckpointError) else f"{self.path}: not saved, {e}{intact}"
            self._abandon()

    def begin(
        self,
        plan: Mapping[str, Sequence[PlannedTensor]],
        config: Mapping[str, Any],
        dtype: torch.dtype,
        tokenizer_dir: Path | None,
    ) -> None:
        self._dtype = dtype
        _check_replaceable(self.path)
        shutil.rmtree(self.partial, ignore_errors=True)  # of a save that was killed
        self.partial.mkdir(parents=True)
        _write_json(self.partial / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
        token_ids = {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}
        _write_json(self.partial / GENERATION_FILE, {"_from_model_config": True, **token_ids})
        if tokenizer_dir is not None:
            _copy_tokenizer(tokenizer_dir, self.partial)
        write_index(self.partial, plan)
        self._writer = StreamWriter(self.partial, plan)

    def write(self, part: Part, full: Tensor) -> None:
        rows = full[part.row_start : part.row_start + part.num_rows]
        self._writer.write(part.hf_name, rows.to(self._dtype))

    def finish(self) -> None:
        self._writer.close()
        if not self.path.exists():
            self.partial.rename(self.path)
            return
        replaced = self.path.with_name(f".{self.path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        self.path.rename(replaced)
        self.partial.rename(self.path)
        shutil.rmtree(replaced)

    def _abandon(self) -> None:
        if self._writer:
            try:
                self._writer.close()
            except OSError:
                pass  # the same full disk again; the first error is the one reported
        shutil.rmtree(self.partial, ignore_errors=True)


def _parameters(module: nn.Module, name_map: NameMap) -> dict[str, Tensor]:
    """The module's parameters, and buffers the map names, each covered by its parts without gap or overlap."""
    params = dict(module.named_parameters())
    params |= {name: buffer for name, buffer in module.named_buffers() if name in name_map}
    if set(params) != set(name_map):
        raise CheckpointError(
            f"the name map does not describe this model: unknown to it {_some(set(params) - set(name_map))}, "
            f"not in the model {_some(set(name_map) - set(params))}"
        )
    for name, param in params.items():
        row = 0
        for part in name_map[name]:
            if part.row_start != row:
                raise CheckpointError(f"name map of {name}: {part.hf_name} starts at row {part.row_start}, not {row}")
            row += part.num_rows
        if row != param.shape[0]:
            raise CheckpointError(f"name map of {name}: its parts have {row} rows, the parameter {param.shape[0]}")
    return params


def _check_names(name_map: NameMap, stored: Mapping[str, StoredTensor], path: Path, strict: bool) -> None:
    wanted = {part.hf_name for parts in name_map.values() for part in parts}
    if missing := wanted - set(stored):
        raise CheckpointError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing: {_some(missing)}")
    extra = {name for name in set(stored) - wanted if name != TIED_HEAD and not name.endswith(DERIVED_SUFFIX)}
    if strict and extra:
        raise CheckpointError(
            f"{path}: holds {len(extra)} tensors that this model does not have: {_some(extra)}; is it another model?"
        )


def _check_tensor(part: Part, param: Tensor, stored: StoredTensor) -> None:
    expected = (part.num_rows, *param.shape[1:])
    if stored.shape != expected:
        raise CheckpointError(
            f"{stored.file}: {part.hf_name} has shape {list(stored.shape)}, but the model needs {list(expected)}"
        )
    if stored.dtype not in DTYPE_NAMES.values():
        readable = ", ".join(DTYPE_NAMES.values())
        raise CheckpointError(f"{stored.file}: {part.hf_name} is stored as {stored.dtype}; only {readable} are read")


def _read_part(handle: Any, param: Tensor, part: Part) -> None:
    """Copy those rows of `part` that this rank owns."""
    local, first_row = local_rows(param)
    start = max(part.row_start, first_row)
    stop = min(part.row_start + part.num_rows, first_row + local.shape[0])
    if start < stop:
        rows = handle.get_slice(part.hf_name)[start - part.row_start : stop - part.row_start]
        local[start - first_row : stop - first_row].copy_(rows)


def _check_tied_head(name_map: NameMap, stored: Mapping[str, StoredTensor], path: Path) -> None:
    """A head that is on disk but not in the model must be the embedding, or the model would not be the same."""
    wanted = {part.hf_name for parts in name_map.values() for part in parts}
    if TIED_HEAD in wanted or TIED_HEAD not in stored or TIED_EMBEDDING not in stored:
        return
    head, embedding = (_open_whole(stored[name], name) for name in (TIED_HEAD, TIED_EMBEDDING))
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise CheckpointError(
            f"{path}: {TIED_HEAD} differs from {TIED_EMBEDDING}, but config.json has tie_word_embeddings=true"
        )


def _open_whole(stored: StoredTensor, name: str) -> Tensor:
    with open_file(stored.file) as handle:
        return handle.get_tensor(name)  # a view of the mapped file


def _planned(
    shapes: Mapping[str, tuple[int, ...]], name_map: NameMap, dtype: torch.dtype
) -> Iterable[PlannedTensor]:
    for name, shape in shapes.items():
        for part in name_map[name]:
            yield PlannedTensor(part.hf_name, (part.num_rows, *shape[1:]), dtype)


def _copy_tokenizer(source: Path, target: Path) -> None:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise CheckpointError(f"tokenizer_dir={source}: holds no tokenizer files such as {TOKENIZER_FILES[0]}")
    for file in (*found, source / GENERATION_FILE):
        if file.is_file():
            shutil.copyfile(file, target / file.name)


def _check_replaceable(path: Path) -> None:
    """Never rename away something that is not an earlier export."""
    if not path.exists() or (path.is_dir() and (not any(path.iterdir()) or (path / "config.json").is_file())):
        return
    raise CheckpointError(f"{path}: exists and is not a Hugging Face directory; choose another path, or remove it")


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "none") + more


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
