"""Tokenised files plus a packing plan: a sequence of packs that costs no memory until one is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xtuner.config.data import DataConfig
from xtuner.data.cache import TokenFile, open_token_file
from xtuner.data.packing import PackPlan, best_fit, exact
from xtuner.errors import DataError


@dataclass(frozen=True)
class Pack:
    """Documents that travel together: per document ids int32[n] and mask uint8[n] (1 where the token is learned)."""

    ids: list[np.ndarray]
    masks: list[np.ndarray]

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)


@dataclass(frozen=True)
class DataStats:
    """What was read and what was left out. Tokens and documents are those that made it into packs."""

    num_tokens: int
    num_learned_tokens: int
    num_documents: int
    num_packs: int
    num_malformed: int
    num_skipped_long: int
    num_truncated: int


class PackedDataset(Sequence[Pack]):
    """Packs of at most `pack_max_length` tokens over memory-mapped documents."""

    def __init__(self, files: Sequence[TokenFile], cfg: DataConfig):
        self.files = list(files)
        self._first_document = np.cumsum([0] + [file.num_documents for file in files])
        lengths = np.concatenate([np.diff(file.offsets) for file in files])
        kept, num_truncated = self._fit(lengths, cfg)
        plan = exact if cfg.packing == "exact" else best_fit
        self.plan: PackPlan = plan(lengths[kept], kept, cfg.pack_max_length)
        self.document_lengths = lengths[kept]
        self._kept = kept
        self.stats = DataStats(
            num_tokens=int(self.document_lengths.sum()),
            num_learned_tokens=self._count_learned(kept, self.document_lengths),
            num_documents=len(kept),
            num_packs=self.plan.num_packs,
            num_malformed=sum(file.num_malformed for file in files),
            num_skipped_long=len(lengths) - len(kept),
            num_truncated=num_truncated,
        )
        if not len(kept):
            raise DataError(f"no document to train on in {_names(files)}: {self._why_empty()}")

    def __len__(self) -> int:
        return self.plan.num_packs

    def __getitem__(self, index: int) -> Pack:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        pieces = range(self.plan.starts[index], self.plan.starts[index + 1])
        views = [self._view(self.plan.document[q], self.plan.begin[q], self.plan.length[q]) for q in pieces]
        return Pack([ids for ids, _ in views], [mask for _, mask in views])

    @property
    def num_tokens(self) -> int:
        return self.stats.num_tokens

    @property
    def num_documents(self) -> int:
        return self.stats.num_documents

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Packed document `index`, whole: its ids, its mask, and where it comes from ("file, line n")."""
        file, local = self.locate(self._kept[index])
        ids, mask = self._view(self._kept[index], 0, self.document_lengths[index])
        return ids, mask, f"{file.source}, line {file.lines[local]}"

    def locate(self, document: int) -> tuple[TokenFile, int]:
        """The file a document number belongs to, and its number within that file."""
        file = int(np.searchsorted(self._first_document, document, side="right")) - 1
        return self.files[file], int(document - self._first_document[file])

    def _view(self, document: int, begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        file, local = self.locate(document)
        start = int(file.offsets[local] + begin)
        return file.ids[start : start + length], file.mask[start : start + length]

    def _fit(self, lengths: np.ndarray, cfg: DataConfig) -> tuple[np.ndarray, int]:
        """Which documents are packed, int64[D], and how many were truncated (`lengths` is clipped in place).

        Raises DataError for the first document that is too long under on_long="error".
        """
        everything = np.arange(len(lengths))
        too_long = np.flatnonzero(lengths > cfg.pack_max_length)
        if cfg.packing == "exact" or not len(too_long):
            return everything, 0
        if cfg.on_long == "error":
            raise self._too_long(lengths, too_long, cfg.pack_max_length)
        if cfg.on_long == "skip":
            return np.setdiff1d(everything, too_long), 0
        lengths[too_long] = cfg.pack_max_length
        # A prompt longer than the pack leaves nothing to learn: such a document counts as skipped.
        pointless = [d for d in too_long if not self._view(d, 0, cfg.pack_max_length)[1][1:].any()]
        return np.setdiff1d(everything, pointless), len(too_long) - len(pointless)

    def _too_long(self, lengths: np.ndarray, too_long: np.ndarray, limit: int) -> DataError:
        file, local = self.locate(too_long[0])
        others = f" (and {len(too_long) - 1} more documents are too long)" if len(too_long) > 1 else ""
        return DataError(
            f"{file.source}, line {file.lines[local]}: a document of {lengths[too_long[0]]} tokens exceeds "
            f"data.pack_max_length={limit}{others}: raise it to at least {lengths.max()}, or choose "
            "data.on_long=truncate, data.on_long=skip or data.packing=exact"
        )

    def _count_learned(self, documents: np.ndarray, lengths: np.ndarray) -> int:
        """Learned tokens in the packs; whole files at once where nothing was left out."""
        total = 0
        for file, first, last in zip(self.files, self._first_document, self._first_document[1:], strict=False):
            here = (documents >= first) & (documents < last)
            if lengths[here].sum() == file.num_tokens:
                total += int(np.count_nonzero(file.mask))
            else:
                views = [self._view(d, 0, n)[1] for d, n in zip(documents[here], lengths[here], strict=True)]
                total += sum(int(np.count_nonzero(mask)) for mask in views)
        return total

    def _why_empty(self) -> str:
        if self.stats.num_skipped_long:
            return f"all {self.stats.num_skipped_long} are longer than data.pack_max_length"
        if self.stats.num_malformed:
            first = next(file for file in self.files if file.first_malformed)
            line, reason = first.first_malformed
            return f"all {self.stats.num_malformed} lines are malformed, first {first.source}, line {line}: {reason}"
        return "empty"


def build_dataset(files: Sequence[Path], cfg: DataConfig, tokenizer_dir: Path | str) -> PackedDataset:
    """Tokenise `files` into the cache unless they are there, and plan the packs.

    Raises DataError naming file and line for: a missing or unknown file, a malformed line (on_malformed="error"), a
    document longer than a pack (on_long="error"), nothing to train on, an unusable tokenizer or chat template.
    """
    if not files:
        raise DataError("no data files given: name at least one .jsonl or .txt file in data.train")
    return PackedDataset([open_token_file(Path(file), cfg, Path(tokenizer_dir)) for file in files], cfg)


def _names(files: Sequence[TokenFile]) -> str:
    shown = ", ".join(str(file.source) for file in files[:3])
    return shown + (f" and {len(files) - 3} more" if len(files) > 3 else "")
