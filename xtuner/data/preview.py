"""What the model will see, on a terminal: counts, packs, document lengths, and the loss mask in colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xtuner.config.data import DataConfig
from xtuner.data.dataset import PackedDataset, build_dataset
from xtuner.data.tokenize import load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 40
SAMPLE_TOKENS = 400


def preview(
    files: Sequence[Path],
    cfg: DataConfig,
    tokenizer_dir: Path | str,
    console: Console | None = None,
    num_samples: int = 3,
) -> PackedDataset:
    """Print counts, a length histogram and the loss mask of `num_samples` documents spread over the data.

    Learned tokens are green, the rest is dim. Returns the dataset. Raises DataError as `build_dataset` does.
    """
    from rich.console import Console

    console = console or Console()
    dataset = build_dataset(files, cfg, tokenizer_dir)
    console.print(_counts(dataset, cfg))
    console.print(_histogram(dataset.document_lengths))
    tokenizer = load_tokenizer(tokenizer_dir) if num_samples else None
    chosen = np.unique(np.linspace(0, dataset.num_documents - 1, num_samples).astype(int)) if num_samples else []
    for index in chosen:
        console.print(_sample(dataset, int(index), tokenizer))
    return dataset


def _counts(dataset: PackedDataset, cfg: DataConfig):
    from rich.table import Table

    stats = dataset.stats
    fill = dataset.plan.fill() / cfg.pack_max_length
    table = Table(show_header=False, box=None)
    table.add_column(justify="right", style="bold")
    table.add_column()
    rows = [
        (stats.num_documents, "documents"),
        (stats.num_tokens, "tokens"),
        (stats.num_learned_tokens, f"of them learned ({stats.num_learned_tokens / stats.num_tokens:.1%})"),
        (stats.num_packs, f"packs of {cfg.pack_max_length} ({cfg.packing}), {fill.mean():.1%} full on average"),
        (stats.num_malformed, "malformed lines skipped"),
        (stats.num_skipped_long, "documents skipped as too long"),
        (stats.num_truncated, "documents truncated"),
    ]
    for number, text in rows:
        table.add_row(f"{number:,}", text)
    return table


def _histogram(lengths: np.ndarray):
    """Documents by length, in powers of two."""
    from rich.table import Table

    table = Table("tokens", "documents", "", box=None, title="document lengths", title_justify="left")
    exponents = np.frexp(lengths)[1]  # n tokens: 2**(e-1) <= n < 2**e
    counts = np.bincount(exponents)
    for exponent in range(int(exponents.min()), len(counts)):
        low, high, count = 1 << (exponent - 1), (1 << exponent) - 1, int(counts[exponent])
        bar = "█" * -(-count * BAR_WIDTH // int(counts.max()))
        table.add_row(f"{low}–{high}" if low < high else f"{low}", f"{count:,}", bar)
    return table


def _sample(dataset: PackedDataset, index: int, tokenizer: Any):
    from rich.panel import Panel
    from rich.text import Text

    ids, mask, where = dataset.document(index)
    shown = min(len(ids), SAMPLE_TOKENS)
    body = Text()
    edges = np.flatnonzero(np.diff(mask[:shown])) + 1
    for begin, end in zip([0, *edges], [*edges, shown], strict=True):
        # A run at a time: a character may be made of several tokens.
        body.append(tokenizer.decode(ids[begin:end].tolist()), style="green" if mask[begin] else "dim")
    if shown < len(ids):
        body.append(f"\n… {len(ids) - shown} more tokens", style="italic")
    learned = int(np.count_nonzero(mask))
    return Panel(body, title=f"{where}: {len(ids)} tokens, {learned} learned (green)", title_align="left")
