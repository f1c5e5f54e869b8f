"""Generation against transformers' own, in a batch and one by one, and its settings."""

from __future__ import annotations

import json

import pytest
import torch

from tests.engine.tiny import make_tokenizer
from tests.models.hf_models import BASE, DEEPSEEK, FAMILIES, MOE
from xtuner.engine.generate import Generator, sampling_distribution
from xtuner.errors import CheckpointError, ConfigError, DataError
from xtuner.run import main

PROMPTS = ["the router", "a", "many experts weigh the tokens of a gate", "pick "]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe", "llama", "deepseek_v3"])
def directory(request, tmp_path_factory):
    """A random model with a byte tokenizer, as transformers saves it. Weights are large, so that choices are clear."""
    path = tmp_path_factory.mktemp(request.param)
    make_tokenizer(path)
    config_class, model_class = FAMILIES[request.param]
    fields = BASE | {"qwen3_moe": MOE, "deepseek_v3": DEEPSEEK}.get(request.param, {})
    fields |= {"vocab_size": 257, "initializer_range": 0.3}
    torch.manual_seed(0)
    model_class(config_class(**fields, bos_token_id=None, eos_token_id=0, pad_token_id=0)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(directory):
    return Generator(directory)


def reference(model, ids, max_new_tokens):
    """transformers' greedy continuation of one prompt."""
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_new_tokens, do_sample=False
    )
    new = out[0, len(ids) :].tolist()
    return new[: new.index(0)] if 0 in new else new


def test_greedy_equals_transformers(directory, generator):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sequences = [generator.tokenizer(p)["input_ids"] for p in PROMPTS]
    expected = [reference(model, ids, 16) for ids in sequences]
    assert generator.generate_ids(sequences, 16) == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 3}])
def test_a_batch_equals_its_prompts_one_by_one(generator, sampling):
    together = generator.generate(PROMPTS, 16, **sampling)
    seed = sampling.pop("seed", 0)
    alone = [generator.generate([p], 16, **sampling, seed=seed + i)[0] for i, p in enumerate(PROMPTS)]
    assert together == alone


def test_the_seed_decides(generator):
    def sampled(seed):
        return generator.generate(["the router"] * 3, 12, temperature=2.0, seed=seed)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(50)
    assert len(set(sampled(1))) > 1  # equal prompts of a batch draw differently


def test_stops_before_the_end_token(directory, generator, monkeypatch):
    free = generator.generate_ids([generator.tokenizer(p)["input_ids"] for p in PROMPTS], 12)
    end = free[0][3]
    monkeypatch.setattr(generator, "end_tokens", {end})
    stopped = generator.generate_ids([generator.tokenizer(p)["input_ids"] for p in PROMPTS], 12)
    assert stopped[0] == free[0][: free[0].index(end)] and len(stopped[0]) <= 3
    assert stopped == [ids[: ids.index(end)] if end in ids else ids for ids in free]


def test_end_tokens_come_from_the_generation_config_first(directory, generator, tmp_path):
    assert generator.end_tokens == {0}
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert Generator(copy).end_tokens == {5, 6}
    (copy / "generation_config.json").write_text('{"eos_token')
    with pytest.raises(CheckpointError, match="generation_config.json: truncated or malformed JSON"):
        Generator(copy)


def test_chat_goes_through_the_template(generator, monkeypatch):
    messages = [{"role": "user", "content": "the router"}]
    with pytest.raises(DataError, match="the tokenizer has no chat template, which messages need"):
        generator.generate([messages], 4)
    monkeypatch.setattr(generator.tokenizer, "chat_template", CHAT)
    assert generator.generate([messages], 8) == generator.generate(["<user>the router<assistant>"], 8)


def test_bad_arguments_are_named(generator):
    for arguments, message in {
        ("max_new_tokens", 0): "max_new_tokens=0: must be at least 1",
        ("temperature", -1.0): "temperature=-1.0: must be at least 0",
        ("top_p", 0.0): "top_p=0.0: must be above 0 and at most 1",
        ("top_k", -2): "top_k=-2: must be at least 0",
        ("max_new_tokens", 255): "max_new_tokens=255: the longest prompt would grow to 2.. tokens, but .* for 256",
    }.items():
        with pytest.raises(ConfigError, match=message):
            generator.generate(["the router"], **dict([arguments]))
    with pytest.raises(DataError, match="prompt 1: empty"):
        generator.generate(["a", ""])
    assert generator.generate([]) == []


def test_filters_keep_what_transformers_keeps():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    ours = sampling_distribution(logits, 0.7, top_p=0.8, top_k=20)
    torch.testing.assert_close(ours, expected.softmax(-1))
    assert ((ours > 0).sum(-1) < 20).any()


def test_bfloat16_runs(directory):
    assert Generator(directory, "bfloat16").generate(["the router"], 4)[0]


def test_the_command_prints_prompt_and_continuation(directory, generator, capsys, monkeypatch):
    command = ["generate", str(directory), "--prompt", "the router", "--prompt", "a", "--max-new-tokens", "6"]
    monkeypatch.setattr("sys.argv", ["xtuner.run", *command])
    assert main(command) == 0
    first, second = generator.generate(["the router", "a"], 6)
    assert capsys.readouterr().out == f"the router{first}\n\na{second}\n\n"
