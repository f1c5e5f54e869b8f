"""Samples to token ids and loss masks, in parallel batches.

The whole conversation is tokenised once, as one string, so the ids are exactly those of
`tokenizer.apply_chat_template(messages, tokenize=True)`; characters are mapped to tokens by the tokenizer's offsets.
transformers is imported only when something must really be tokenised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xtuner.data.chat_template import ChatTemplate, TemplateMismatch, learned_tokens
from xtuner.data.source import BadLine, ChatSample, Sample
from xtuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARS = 1 << 20
BATCH_SAMPLES = 1024


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory. Raises DataError naming the directory and what is wrong."""
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"tokenizer={directory}: no such directory")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as e:  # the parser in Rust raises bare Exception
        raise DataError(f"tokenizer={directory}: cannot be loaded: {e}") from e
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer={directory}: {type(tokenizer).__name__} has no character offsets, which loss masks need; "
            "convert it to a tokenizer.json"
        )
    return tokenizer


@dataclass(frozen=True)
class Tokens:
    """One document, or one piece of a long one: ids int32[n], mask uint8[n] (1 where the token is learned)."""

    line: int
    ids: np.ndarray
    mask: np.ndarray
    first: bool = True
    last: bool = True


class Encoder:
    """Turns samples into Tokens.

    chat_template: text of a template that replaces the tokenizer's own. Text samples get the tokenizer's leading
    special tokens (if it has any, as Llama's <|begin_of_text|>) and end in its end-of-sequence token.
    """

    def __init__(self, tokenizer_dir: Path, chat_template: str | None = None, use_chatml: bool = False):
        from tokenizers import Tokenizer

        self.tokenizer = load_tokenizer(tokenizer_dir)
        if self.tokenizer.eos_token_id is None:
            raise DataError(f"tokenizer={tokenizer_dir}: has no eos_token, which must end every document")
        # Padding and truncation are none of ours, and a post-processor may trim white space out of the offsets.
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        self._backend = Tokenizer.from_str(
            json.dumps({**state, "post_processor": None, "truncation": None, "padding": None})
        )
        self._special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._prefix = self._leading_specials()
        self._template_args = (chat_template, use_chatml)
        self._template: ChatTemplate | None = None

    def encode(self, samples: Iterator[Sample | BadLine]) -> Iterator[Tokens | BadLine]:
        """Tokens of every sample, in order; a BadLine passes through, and one is made where a template does not fit."""
        for batch in _batches(samples):
            rendered = [self._render(sample) for sample in batch]
            texts = [item[0] for item in rendered if not isinstance(item, BadLine)]
            encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
            for sample, item in zip(batch, rendered, strict=True):
                if isinstance(item, BadLine):
                    yield item
                elif isinstance(sample, ChatSample):
                    yield self._chat_tokens(sample, *item, next(encodings))
                else:
                    yield self._text_tokens(sample, next(encodings))

    @property
    def template(self) -> ChatTemplate:
        """Made when the first conversation is met, for plain text needs none. Raises DataError when there is none."""
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, *self._template_args)
        return self._template

    def _render(self, sample: Sample | BadLine):
        if isinstance(sample, BadLine):
            return sample
        if not isinstance(sample, ChatSample):
            return sample.text, None
        try:
            return self.template.render(sample)
        except TemplateMismatch as e:
            return BadLine(sample.line, str(e))

    def _chat_tokens(self, sample: ChatSample, text: str, spans: list, encoding) -> Tokens | BadLine:
        ids = np.array(encoding.ids, dtype=np.int32)
        mask = np.zeros(len(ids), dtype=np.uint8)
        is_special = [i in self._special for i in encoding.ids]
        for first, last in learned_tokens(spans, encoding.offsets, is_special, text):
            mask[first:last] = 1
        if not mask[1:].any():
            return BadLine(sample.line, "messages: nothing to learn, the learned messages render to no token")
        return Tokens(sample.line, ids, mask)

    def _text_tokens(self, sample, encoding) -> Tokens:
        prefix = self._prefix if sample.first else []
        end = [self.tokenizer.eos_token_id] if sample.last else []
        ids = np.array([*prefix, *encoding.ids, *end], dtype=np.int32)
        return Tokens(sample.line, ids, np.ones(len(ids), dtype=np.uint8), sample.first, sample.last)

    def _leading_specials(self) -> list[int]:
        """What the tokenizer puts before a text (a beginning-of-sequence token, or nothing)."""
        plain = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a", add_special_tokens=True)
        for i in range(len(whole)):
            if whole[i : i + len(plain)] == plain:
                return whole[:i]
        return []


def _batches(samples: Iterator[Sample | BadLine]) -> Iterator[list]:
    batch, chars = [], 0
    for sample in samples:
        batch.append(sample)
        chars += _size(sample)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_SAMPLES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _size(sample: Sample | BadLine) -> int:
    if isinstance(sample, BadLine):
        return 0
    if isinstance(sample, ChatSample):
        return sum(len(message.get("content", "")) for message in sample.messages)
    return len(sample.text)
