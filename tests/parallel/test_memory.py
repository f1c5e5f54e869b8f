"""Sequence parallelism: N ranks hold a sequence N times as long in the same memory each."""

import pytest

from tests.parallel import memory_rank
from tests.parallel.pool import RankPool

TOKENS = 2048


def run(num_ranks, num_tokens):
    pool = RankPool(num_ranks)  # fresh processes: memory freed by earlier runs would be used again
    try:
        results = pool.run(memory_rank.step_on_long_document, num_ranks, num_tokens)
    finally:
        pool.close()
    losses, peaks = zip(*results, strict=True)
    assert len(set(losses)) == 1
    return losses[0], max(peaks)


@pytest.mark.long
def test_four_ranks_hold_four_times_the_sequence_in_the_same_memory(imports_happen_once):
    _, one_rank = run(1, TOKENS)
    loss, four_ranks = run(4, 4 * TOKENS)
    expected, whole = run(1, 4 * TOKENS)
    print(
        f"\npeak memory of a step per rank: 1 rank, {TOKENS} tokens: {one_rank:.0f} MiB; 4 ranks, {4 * TOKENS} tokens: "
        f"{four_ranks:.0f} MiB ({four_ranks / one_rank:.2f}x); 1 rank, {4 * TOKENS} tokens: {whole:.0f} MiB"
    )
    assert four_ranks < 1.1 * one_rank and one_rank > 50
    assert loss == pytest.approx(expected, rel=1e-5)
