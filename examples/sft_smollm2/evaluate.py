"""Exact match of a model on generated tasks.

    python examples/sft_smollm2/evaluate.py MODEL_DIR TASKS.jsonl

An answer counts as exact when it equals the expected one but for white space around it. How many replies merely
contain the expected answer somewhere is counted too: it tells a model that cannot do the task from one that only
talks too much.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from xtuner.engine.generate import Generator

BATCH = 64
# The longest expected answer has about 20 tokens; a model that talks on is cut here.
MAX_NEW_TOKENS = 28


@dataclass
class Score:
    count: int = 0
    exact: int = 0
    contained: int = 0

    def add(self, reply: str, expected: str) -> None:
        self.count += 1
        self.exact += reply.strip() == expected
        self.contained += expected in reply

    @property
    def exact_percent(self) -> float:
        return 100 * self.exact / self.count

    @property
    def contained_percent(self) -> float:
        return 100 * self.contained / self.count


def evaluate(model: Path, tasks: Path) -> dict[str, Score]:
    """Scores by task, and of all under "all"; greedy decoding in float32."""
    generator = Generator(model)
    problems = [json.loads(line) for line in tasks.read_text().splitlines()]
    scores: dict[str, Score] = {}
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        replies = generator.generate([p["messages"][:-1] for p in batch], MAX_NEW_TOKENS)
        for problem, reply in zip(batch, replies, strict=True):
            for name in (problem["task"], "all"):
                scores.setdefault(name, Score()).add(reply, problem["messages"][-1]["content"])
    return {name: scores[name] for name in sorted(scores, key=lambda name: (name == "all", name))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tasks", type=Path)
    args = parser.parse_args()
    for name, score in evaluate(args.model, args.tasks).items():
        print(f"{name:15} {score.exact_percent:5.1f} % exact, {score.contained_percent:5.1f} % contain the answer")
