"""Instruction data with exact answers: small problems about numbers, words and letters.

    python examples/sft_smollm2/make_tasks.py DIR

writes DIR/train.jsonl and DIR/held_out.jsonl, the same on every machine. No question is in both, and single-word tasks
ask in held_out.jsonl about words that the training data never mentions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

WORDS = Path(__file__).with_name("words.txt").read_text().split()
SYSTEM = "Give only the answer."
Problem = tuple[str, str]
Words = list[str]


def add(rng: random.Random, words: Words) -> Problem:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"What is {a} + {b}?", str(a + b)


def largest(rng: random.Random, words: Words) -> Problem:
    numbers = rng.sample(range(10, 100), 4)
    return f"Which number is the largest: {_listed(numbers)}?", str(max(numbers))


def sort_numbers(rng: random.Random, words: Words) -> Problem:
    numbers = rng.sample(range(10, 100), 4)
    return f"Sort from small to large: {_listed(numbers)}", _listed(sorted(numbers))


def sort_words(rng: random.Random, words: Words) -> Problem:
    chosen = rng.sample(words, 3)
    return f"Sort alphabetically: {_listed(chosen)}", _listed(sorted(chosen))


def reverse_words(rng: random.Random, words: Words) -> Problem:
    chosen = rng.sample(words, 4)
    return f"Write in reverse order: {_listed(chosen)}", _listed(reversed(chosen))


def pick_word(rng: random.Random, words: Words) -> Problem:
    chosen = rng.sample(words, 4)
    place = rng.randrange(4)
    ordinal = ("first", "second", "third", "fourth")[place]
    return f"Which word is the {ordinal}: {_listed(chosen)}?", chosen[place]


def count_words(rng: random.Random, words: Words) -> Problem:
    chosen = rng.sample(words, rng.randint(2, 8))
    return f"How many words are here: {_listed(chosen)}?", str(len(chosen))


def initials(rng: random.Random, words: Words) -> Problem:
    chosen = rng.sample(words, 3)
    return f"Take the first letter of each word: {_listed(chosen)}", _listed(word[0] for word in chosen)


def uppercase(rng: random.Random, words: Words) -> Problem:
    word = rng.choice(words)
    return f"Write in capital letters: {word}", word.upper()


def spell(rng: random.Random, words: Words) -> Problem:
    word = rng.choice(words)
    return f"Spell with spaces between the letters: {word}", " ".join(word)


TASKS: dict[str, Callable[[random.Random, Words], Problem]] = {
    task.__name__: task
    for task in (
        add, largest, sort_numbers, sort_words, reverse_words, pick_word, count_words, initials, uppercase, spell,
    )
}  # fmt: skip


def make_tasks(directory: Path, num_train: int = 3000, num_held_out: int = 200, seed: int = 0) -> tuple[Path, Path]:
    """Write both files; their paths. Every task has the same share of each, in an order that mixes them."""
    rng = random.Random(seed)
    words = rng.sample(WORDS, len(WORDS))
    held_out_words, train_words = words[:80], words[80:]
    held_out = _draw(rng, num_held_out, held_out_words, without=set())
    train = _draw(rng, num_train, train_words, without={question for _, question, _ in held_out})
    directory.mkdir(parents=True, exist_ok=True)
    return _write(directory / "train.jsonl", train), _write(directory / "held_out.jsonl", held_out)


def _draw(rng: random.Random, count: int, words: Words, without: set[str]) -> list[tuple[str, str, str]]:
    """(task, question, answer), in turns. Single-word tasks run out of words, so training may repeat a question."""
    problems = []
    while len(problems) < count:
        task = list(TASKS)[len(problems) % len(TASKS)]
        question, answer = TASKS[task](rng, words)
        if question not in without:
            problems.append((task, question, answer))
    rng.shuffle(problems)
    return problems


def _write(file: Path, problems: list[tuple[str, str, str]]) -> Path:
    with open(file, "w") as f:
        for task, question, answer in problems:
            roles = {"system": SYSTEM, "user": question, "assistant": answer}
            messages = [{"role": role, "content": content} for role, content in roles.items()]
            f.write(json.dumps({"task": task, "messages": messages}) + "\n")
    return file


def _listed(items) -> str:
    return ", ".join(map(str, items))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    print(*make_tasks(parser.parse_args().directory), sep="\n")
