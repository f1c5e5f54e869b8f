"""What is read, how it is tokenised, and how it is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from xtuner.config.base import ConfigBase


class DataConfig(ConfigBase):
    """JSONL files with `{"messages": [...], "tools": [...]}` or `{"text": "..."}` per line, or plain .txt files."""

    train: tuple[Path, ...] = Field((), description="training files (.jsonl, .txt)")
    validation: tuple[Path, ...] = Field((), description="validation files; empty: no validation")
    tokenizer: Path | None = Field(None, description="Hugging Face tokenizer directory; None: that of model.path")
    chat_template: Path | None = Field(
        None, description="Jinja file; None: the tokenizer's own template, else an error naming `chatml`"
    )
    use_chatml: bool = Field(False, description="use the built-in ChatML (Qwen) template when the tokenizer has none")
    pack_max_length: int = Field(4096, gt=1, description="tokens per pack")
    packing: Literal["best_fit", "exact"] = Field(
        "best_fit", description="best_fit keeps documents whole; exact cuts them to fill every pack"
    )
    on_long: Literal["error", "truncate", "skip"] = Field(
        "error", description="a document longer than pack_max_length, with best_fit packing"
    )
    on_malformed: Literal["error", "skip"] = Field(
        "error", description="a line that is no valid sample: stop, or skip and count"
    )
    shuffle: bool = Field(True, description="visit packs in a new random order each epoch")
    cache_dir: Path = Field(Path(".cache/xtuner/tokens"), description="tokenised files, keyed by content and settings")
