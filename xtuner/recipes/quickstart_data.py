"""The quickstart's corpus: English that every machine with Python already has.

Python's language reference (`pydoc_data.topics`) and the docstrings of the standard library, about 2 MB. One document
per module or topic. Whole modules are held out, chosen by a hash of their name, and a paragraph occurs once in the
whole corpus: what is held out was never seen in training. The tokenizer is trained on the training split alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xtuner.data.chat_template import CHATML
from xtuner.errors import DataError

FORMAT = 1  # of the corpus; a higher number makes it anew
VOCAB_SIZE = 1024
HELD_OUT_EVERY = 18  # one module in so many; about a twentieth of the text
MIN_CORPUS_CHARS = 500_000
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
NO_DOCUMENTATION = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "topics.py",
}


@dataclass(frozen=True)
class QuickstartData:
    """train, validation: JSONL files; tokenizer: a Hugging Face directory; unigram_entropy: nats per held-out token."""

    train: Path
    validation: Path
    tokenizer: Path
    unigram_entropy: float


def prepare(directory: Path) -> QuickstartData:
    """Make the corpus and its tokenizer in `directory`, unless they are there. Atomic: complete or absent.

    Raises DataError when this Python comes without its documentation.
    """
    directory = Path(directory)
    if not _is_current(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            _write(building)
            building.chmod(0o755)
            _publish(building, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    facts = json.loads((directory / "facts.json").read_text())
    return QuickstartData(
        directory / "train.jsonl", directory / "validation.jsonl", directory / "tokenizer", facts["unigram_entropy"]
    )


def unigram_entropy(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy, in nats per token, of the token frequencies of `train` measured on `validation` (1-D integers).

    Add-one smoothing: p(v) = (count(v) + 1) / (len(train) + vocab_size). No model that ignores context does better.
    """
    counts = np.bincount(train, minlength=vocab_size)
    log_p = np.log(counts + 1.0) - math.log(len(train) + vocab_size)
    return float(-log_p[validation].mean())


def _write(directory: Path) -> None:
    train, validation = split(documents())
    size = sum(map(len, train)) + sum(map(len, validation))
    if size < MIN_CORPUS_CHARS or not validation:
        raise DataError(
            f"found only {size} characters of documentation in {sysconfig.get_path('stdlib')}, expected at least "
            f"{MIN_CORPUS_CHARS}: this Python was installed without the sources of its standard library"
        )
    for name, texts in (("train", train), ("validation", validation)):
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    tokenizer = train_tokenizer(train, VOCAB_SIZE)
    _save_tokenizer(tokenizer, directory / "tokenizer")
    train_ids, validation_ids = _token_ids(tokenizer, train), _token_ids(tokenizer, validation)
    facts = {
        "unigram_entropy": unigram_entropy(train_ids, validation_ids, VOCAB_SIZE),
        "train_tokens": len(train_ids),
        "validation_tokens": len(validation_ids),
        "made_with": _made_with(),
    }
    (directory / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def _publish(building: Path, directory: Path) -> None:
    """Rename into place; when another process was faster, its equal result stays."""
    if directory.exists() and not _is_current(directory):
        shutil.rmtree(directory)
    try:
        os.rename(building, directory)
    except OSError:
        if not _is_current(directory):
            raise


def _is_current(directory: Path) -> bool:
    """Whether a complete corpus is there (facts.json is written last), made from the same Python in the same way."""
    facts = directory / "facts.json"
    return facts.exists() and json.loads(facts.read_text()).get("made_with") == _made_with()


def _made_with() -> dict:
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "vocab_size": VOCAB_SIZE,
        "held_out_every": HELD_OUT_EVERY,
    }


def documents() -> dict[str, list[str]]:
    """Paragraphs by module or topic name, in a fixed order."""
    from pydoc_data.topics import topics

    found = {f"topic {name}": _paragraphs([text]) for name, text in sorted(topics.items())}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if not NO_DOCUMENTATION & set(place.parts):
            found[".".join(place.with_suffix("").parts)] = _paragraphs(_docstrings(path))
    return found


def split(found: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts), one per module. Of equal paragraphs the first stays, training before all."""
    held_out = {name for name in found if _hash(name) % HELD_OUT_EVERY == 0}
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for part, names in zip(parts, ([n for n in found if n not in held_out], sorted(held_out)), strict=True):
        for name in names:
            text = "\n\n".join(_unseen(found[name], seen))
            if text:
                part.append(text)
    return parts


def normalised(paragraph: str) -> str:
    """Two paragraphs are the same when this is: white space and letter case do not count."""
    return " ".join(paragraph.split()).lower()


def _unseen(paragraphs: Iterable[str], seen: set[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        key = normalised(paragraph)
        if key not in seen:
            seen.add(key)
            yield paragraph


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in _definitions(tree) if isinstance(node, documented) and (text := ast.get_docstring(node))]


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it that can hold a definition, in source order."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _definitions(child)


def _paragraphs(texts: Iterable[str]) -> list[str]:
    blocks = (block.rstrip() for text in texts for block in re.split(r"\n\s*\n", text.strip("\n")))
    return [block for block in blocks if block.strip()]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE `tokenizers.Tokenizer` with exactly `vocab_size` tokens, special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save_tokenizer(tokenizer, directory: Path) -> None:
    """The files AutoTokenizer reads, written directly: importing transformers would cost more than all the rest."""
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "model_max_length": 1_000_000,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (directory / "chat_template.jinja").write_text(CHATML)


def _token_ids(tokenizer, texts: list[str]) -> np.ndarray:
    """All texts end to end, each with its end-of-text token, as they are trained on."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return np.concatenate(
        [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    )
