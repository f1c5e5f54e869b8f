"""A small tokenizer trained on the spot, and files to tokenise."""

import json
import random
from pathlib import Path

import pytest

from xtuner.config import DataConfig

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu, nu. xi? omicron! pi".split()
CORPUS = ["The quick brown fox jumps over the lazy dog. assistant user system tool\n"] * 3 + [" ".join(WORDS)] * 3


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
    """make_tokenizer(chat_template=None, trim_offsets=False, **special): a Hugging Face directory."""

    def make(chat_template: str | None = None, trim_offsets: bool = False, **special: str) -> Path:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        special = {"eos_token": "<|endoftext|>", **special}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        directory = tmp_path_factory.mktemp("tokenizer")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in special.items() if v})
        fast.chat_template = chat_template
        fast.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(make_tokenizer) -> Path:
    return make_tokenizer()


@pytest.fixture
def cfg(tmp_path) -> DataConfig:
    return DataConfig(pack_max_length=64, use_chatml=True, cache_dir=tmp_path / "cache")


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(lines, name="data.jsonl"): objects become JSON, strings stay as they are."""

    def write(lines: list, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def texts():
    """texts(n, seed=0, longest=12): n JSONL objects of 1..longest words."""

    def make(n: int, seed: int = 0, longest: int = 12) -> list[dict]:
        rng = random.Random(seed)
        return [{"text": f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))} for i in range(n)]

    return make
