"""Several runs through the same module in turns."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")


def interleave(runs: Sequence[Generator[None, None, T]]) -> list[T]:
    """Take each run to its next pause in turn, until all have returned; their results in order.

    A run pauses where it has sent something and would have to wait for it: the others compute meanwhile. Backward
    visits what was done last first, and so overlaps in the same way.
    """
    results: dict[int, T] = {}
    while len(results) < len(runs):
        for index, run in enumerate(runs):
            if index not in results:
                try:
                    next(run)
                except StopIteration as done:
                    results[index] = done.value
    return [results[index] for index in range(len(runs))]
