"""Tokenised files on disk: written once, memory-mapped ever after.

One directory per source file, named by a hash of all that decides its contents: the file's bytes, the tokenizer's
files, the chat template. Packing is not part of it, so changing the pack length tokenises nothing again. The directory
is written under another name and renamed when complete; sizes and checksums are verified on opening, and a damaged one
is built again.

    ids.bin      int32[N]    tokens of all documents, end to end
    mask.bin     uint8[N]    1 where a token is learned
    offsets.bin  int64[D+1]  document boundaries; offsets[D] == N
    lines.bin    int64[D]    line of the source file a document came from
    meta.json    counts, checksums, what was malformed
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xtuner.config.data import DataConfig
from xtuner.data.chat_template import CHATML, template_text
from xtuner.data.source import BadLine, check_file, read_samples
from xtuner.data.tokenize import Encoder, Tokens
from xtuner.errors import DataError

FORMAT = 1
ARRAYS = {"ids": np.int32, "mask": np.uint8, "offsets": np.int64, "lines": np.int64}
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*",
    "vocab*", "merges.txt", "*.model", "*.tiktoken", "config.json",
)  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """One source file, tokenised. `num_malformed` lines were skipped; `first_malformed` is (line, reason) or None."""

    source: Path
    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    num_malformed: int
    first_malformed: tuple[int, str] | None

    @property
    def num_documents(self) -> int:
        return len(self.lines)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


def open_token_file(source: Path, cfg: DataConfig, tokenizer_dir: Path) -> TokenFile:
    """The tokens of `source`, from the cache if they are there.

    Of several processes that ask at once, one tokenises and the others wait. Raises DataError for a missing file, an
    unusable tokenizer or template, and for a malformed line when cfg.on_malformed is "error".
    """
    check_file(source)
    template = template_text(cfg.chat_template)
    key = _key(source, tokenizer_dir, template, cfg.use_chatml)
    place = cfg.cache_dir / key
    opened = _open(source, place)
    if opened is None:
        cfg.cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cfg.cache_dir / f"{key}.lock"):
            opened = _open(source, place)
            if opened is None:
                stop_at_malformed = cfg.on_malformed == "error"
                _build(source, place, lambda: Encoder(tokenizer_dir, template, cfg.use_chatml), stop_at_malformed)
                opened = _open(source, place)
                if opened is None:
                    raise DataError(
                        f"data.cache_dir={cfg.cache_dir}: {place.name} is damaged right after it was written"
                    )
    if cfg.on_malformed == "error" and opened.first_malformed:
        raise malformed_error(source, *opened.first_malformed)
    return opened


def malformed_error(source: Path, line: int, reason: str) -> DataError:
    return DataError(f"{source}, line {line}: {reason} (data.on_malformed=skip leaves such lines out and counts them)")


def _key(source: Path, tokenizer_dir: Path, template: str | None, use_chatml: bool) -> str:
    tokenizer_dir = Path(tokenizer_dir)
    if not tokenizer_dir.is_dir():
        raise DataError(f"tokenizer={tokenizer_dir}: no such directory")
    files = sorted({path for pattern in TOKENIZER_FILES for path in tokenizer_dir.glob(pattern) if path.is_file()})
    parts = [f"format {FORMAT}", source.suffix, _digest(source)]
    parts += [f"{path.relative_to(tokenizer_dir)} {_digest(path)}" for path in files]
    parts.append(json.dumps([template, CHATML if use_chatml else None]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock; the kernel lets go of it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(source: Path, place: Path) -> TokenFile | None:
    """The tokens at `place`, or None when there are none or they are damaged."""
    try:
        meta = json.loads((place / "meta.json").read_text())
        arrays = {name: _map(place / f"{name}.bin", dtype, meta["arrays"][name]) for name, dtype in ARRAYS.items()}
        malformed = meta["first_malformed"]
        return TokenFile(
            source,
            **arrays,
            num_malformed=meta["num_malformed"],
            first_malformed=tuple(malformed) if malformed else None,
        )
    except FileNotFoundError:
        if place.exists():
            logger.warning("token cache %s is incomplete; tokenising again", place)
    except (_Damaged, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        logger.warning("token cache %s is damaged (%s); tokenising again", place, e)
    return None


class _Damaged(Exception):
    pass


def _map(path: Path, dtype: type, expected: dict) -> np.ndarray:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise _Damaged(f"{path.name} has {size} bytes instead of {expected['bytes']}")
    if size == 0:
        return np.empty(0, dtype=dtype)
    array = np.memmap(path, dtype=dtype, mode="r")
    if _checksum(array) != expected["crc32"]:
        raise _Damaged(f"{path.name} does not match its checksum")
    return array


def _checksum(array: np.ndarray, chunk: int = 1 << 24) -> int:
    crc = 0
    for start in range(0, len(array), chunk):
        crc = zlib.crc32(array[start : start + chunk], crc)
    return crc


def _build(source: Path, place: Path, make_encoder: Callable[[], Encoder], stop_at_malformed: bool) -> None:
    """Tokenise `source` into `place`. The caller holds the lock, so leftovers of a killed process may go."""
    for leftover in place.parent.glob(f".{place.name}.*"):
        shutil.rmtree(leftover)
    logger.info("tokenising %s", source)
    before = source.stat()
    building = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        meta = _write(building, source, make_encoder().encode(read_samples(source)), stop_at_malformed)
        after = source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{source}: changed while it was being tokenised")
        (building / "meta.json").write_text(json.dumps(meta, indent=1))
        building.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        if place.exists():
            shutil.rmtree(place)
        os.rename(building, place)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(building: Path, source: Path, documents: Iterable[Tokens | BadLine], stop_at_malformed: bool) -> dict:
    """Write all arrays, streaming; returns meta.json's contents."""
    num_malformed, first_malformed, end = 0, None, 0
    with contextlib.ExitStack() as stack:
        out = {name: _ArrayFile(stack, building / f"{name}.bin", dtype) for name, dtype in ARRAYS.items()}
        out["offsets"].append([0])
        for item in documents:
            if isinstance(item, BadLine):
                if stop_at_malformed:
                    raise malformed_error(source, item.line, item.reason)
                num_malformed += 1
                first_malformed = first_malformed or (item.line, item.reason)
                continue
            out["ids"].append(item.ids)
            out["mask"].append(item.mask)
            end += len(item.ids)
            if item.first:
                out["lines"].append([item.line])
            if item.last:
                out["offsets"].append([end])
        arrays = {name: file.finish() for name, file in out.items()}
    return {"format": FORMAT, "arrays": arrays, "num_malformed": num_malformed, "first_malformed": first_malformed}


class _ArrayFile:
    """A flat array growing on disk, with its checksum."""

    def __init__(self, stack: contextlib.ExitStack, path: Path, dtype: type):
        self._file = stack.enter_context(path.open("wb"))
        self._dtype, self._bytes, self._crc = dtype, 0, 0

    def append(self, values) -> None:
        raw = np.asarray(values, dtype=self._dtype).tobytes()
        self._file.write(raw)
        self._crc = zlib.crc32(raw, self._crc)
        self._bytes += len(raw)

    def finish(self) -> dict:
        self._file.flush()
        return {"bytes": self._bytes, "crc32": self._crc}
