import json
import math
from pathlib import Path

import numpy as np
import pytest

from xtuner.config import TrainConfig, load_config
from xtuner.data import build_dataset, load_tokenizer
from xtuner.errors import DataError
from xtuner.recipes import quickstart, quickstart_data


@pytest.fixture(scope="module")
def corpus():
    """Every document of this machine's Python, read once."""
    return quickstart_data.documents()


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus):
    directory = tmp_path_factory.mktemp("data") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart_data, "documents", lambda: corpus)
        return quickstart_data.prepare(directory)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_corpus_is_what_it_claims_to_be(corpus):
    assert "Accumulates" in "".join(corpus["fractions"]) or "rational" in "".join(corpus["fractions"])
    assert corpus["topic with"][0].startswith('The "with" statement')
    assert not any(name.startswith(("test.", "idlelib.idle_test", "site-packages")) for name in corpus)
    assert 1_500_000 < sum(len(paragraph) for paragraphs in corpus.values() for paragraph in paragraphs) < 4_000_000


def test_held_out_modules_share_no_paragraph_with_training(made):
    train, held_out = texts(made.train), texts(made.validation)
    paragraphs = [{quickstart_data.normalised(p) for t in part for p in t.split("\n\n")} for part in (train, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    assert sum(len(t.split("\n\n")) for t in train) == len(paragraphs[0])
    assert 0.01 < sum(map(len, held_out)) / sum(map(len, train)) < 0.12


def test_split_keeps_whole_modules_and_the_first_of_equal_paragraphs(monkeypatch):
    monkeypatch.setattr(quickstart_data, "_hash", lambda name: 0 if name == "b" else 1)
    found = {"a": ["One.", "Two."], "b": ["two.", "Three.", "three. "], "c": ["One.", "Four."]}
    assert quickstart_data.split(found) == (["One.\n\nTwo.", "Four."], ["Three."])


def test_docstrings_come_in_source_order(tmp_path):
    source = (
        '"""M\n\nm2"""\nif 1:\n    def f():\n        "F"\nclass C:\n    "C"\n    async def g(self): "G"\nx = "no"\n'
    )
    (tmp_path / "m.py").write_text(source)
    assert quickstart_data._paragraphs(quickstart_data._docstrings(tmp_path / "m.py")) == ["M", "m2", "F", "C", "G"]
    (tmp_path / "broken.py").write_text("def (")
    assert quickstart_data._docstrings(tmp_path / "broken.py") == []


def test_tokenizer_loads_in_transformers_and_is_lossless(made):
    tokenizer = load_tokenizer(made.tokenizer)
    assert len(tokenizer) == quickstart_data.VOCAB_SIZE == quickstart.arch.vocab_size
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == quickstart.arch.eos_token_id
    assert set(quickstart_data.SPECIAL_TOKENS) == set(tokenizer.all_special_tokens)
    for text in (texts(made.validation)[0], "naïve 🦊\t x  =  1 .\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"


def test_unigram_entropy_against_the_definition(made):
    train, validation = np.array([0, 0, 1, 2]), np.array([0, 3])
    expected = -(math.log(3 / 8) + math.log(1 / 8)) / 2
    assert quickstart_data.unigram_entropy(train, validation, 4) == pytest.approx(expected, abs=1e-12)
    assert 4 < made.unigram_entropy < 8


def test_the_entropy_is_over_the_tokens_that_are_trained_on(made, tmp_path):
    cfg = quickstart.config.data.model_copy(update={"cache_dir": tmp_path})
    train, validation = (build_dataset([f], cfg, made.tokenizer).files[0].ids for f in (made.train, made.validation))
    entropy = quickstart_data.unigram_entropy(train, validation, quickstart_data.VOCAB_SIZE)
    assert entropy == pytest.approx(made.unigram_entropy, abs=1e-9)


def test_prepare_is_idempotent_and_repairs_an_interrupted_one(made, monkeypatch):
    def fail():
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(quickstart_data, "documents", fail)
        assert quickstart_data.prepare(made.train.parent) == made


def test_an_incomplete_or_outdated_directory_is_replaced(tmp_path, monkeypatch):
    found = {str(i): [f"Module {i} has functions."] for i in range(99)}
    monkeypatch.setattr(quickstart_data, "documents", lambda: found)
    monkeypatch.setattr(quickstart_data, "VOCAB_SIZE", 270)
    monkeypatch.setattr(quickstart_data, "MIN_CORPUS_CHARS", 100)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "train.jsonl").write_text("half")
    data = quickstart_data.prepare(tmp_path / "q")
    assert len(texts(data.train)) > 80 and [path.name for path in tmp_path.iterdir()] == ["q"]
    monkeypatch.setattr(quickstart_data, "VOCAB_SIZE", 280)
    assert len(load_tokenizer(quickstart_data.prepare(tmp_path / "q").tokenizer)) == 280


def test_python_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart_data, "documents", lambda: {"os": ["Too short."]})
    with pytest.raises(
        DataError, match="found only 10 characters of documentation in .* installed without the sources"
    ):
        quickstart_data.prepare(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_is_a_config_whose_data_prepare_fills_in(made, monkeypatch):
    loaded = load_config("quickstart", ["steps=300"], TrainConfig)
    monkeypatch.setattr(quickstart_data, "prepare", lambda directory: made)
    config = loaded.prepare(loaded.config)
    assert config.steps == 300
    assert config.data.train == (made.train,) and config.data.validation == (made.validation,)
    assert config.data.tokenizer == made.tokenizer
    assert config.log.reference_losses == {"token-unigram entropy": made.unigram_entropy}
    assert TrainConfig.parse(json.loads(config.model_dump_json())) == config
    assert loaded.prepare(config) is config


def test_the_recipe_keeps_its_promises():
    moe = quickstart.arch.moe
    assert moe.num_experts >= 8 and moe.num_experts_per_tok == 2
    hidden, layers = quickstart.arch.hidden_size, quickstart.arch.num_hidden_layers
    experts = layers * moe.num_experts * 3 * hidden * moe.moe_intermediate_size
    attention = (
        layers
        * hidden
        * quickstart.arch.head_dim
        * 2
        * (quickstart.arch.num_attention_heads + quickstart.arch.num_key_value_heads)
    )
    total = experts + attention + quickstart.arch.vocab_size * hidden
    assert 5_000_000 < total < 15_000_000
