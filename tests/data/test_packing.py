import numpy as np
import pytest

from xtuner.data.packing import best_fit, exact

CAPACITY = 50


def random_lengths(seed: int, longest: int = CAPACITY) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 120))
    lengths = rng.integers(1, longest + 1, size=n)
    documents = np.sort(rng.choice(1000, size=n, replace=False))
    return lengths, documents


def packs(plan):
    return [range(plan.starts[p], plan.starts[p + 1]) for p in range(plan.num_packs)]


@pytest.mark.parametrize("seed", range(40))
def test_best_fit_keeps_documents_whole_within_capacity(seed):
    lengths, documents = random_lengths(seed)
    plan = best_fit(lengths, documents, CAPACITY)
    assert dict(zip(plan.document.tolist(), plan.length.tolist(), strict=True)) == dict(
        zip(documents.tolist(), lengths.tolist(), strict=True)
    )
    assert not plan.begin.any()
    assert plan.fill().max() <= CAPACITY and all(len(pack) for pack in packs(plan))
    # Two packs that would fit into one: best-fit never leaves them.
    smallest = np.sort(plan.fill())[:2]
    assert plan.num_packs == 1 or smallest.sum() > CAPACITY
    earliest = [plan.document[pack].min() for pack in packs(plan)]
    assert earliest == sorted(earliest)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_equals_its_definition(seed):
    """Against the quadratic loop: longest first, into the fullest pack with room."""
    lengths, documents = random_lengths(seed)
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(CAPACITY - length)
    plan = best_fit(lengths, documents, CAPACITY)
    assert sorted(CAPACITY - plan.fill()) == sorted(rooms)


def test_best_fit_is_deterministic_and_fast():
    lengths = np.random.default_rng(0).integers(1, 4097, size=100_000)
    documents = np.arange(len(lengths))
    first, second = best_fit(lengths, documents, 4096), best_fit(lengths, documents, 4096)
    assert all(np.array_equal(getattr(first, f), getattr(second, f)) for f in ("starts", "document", "length"))
    assert first.fill().mean() > 0.98 * 4096


@pytest.mark.parametrize("seed", range(40))
def test_exact_cuts_the_stream_every_capacity_tokens(seed):
    lengths, documents = random_lengths(seed, longest=3 * CAPACITY)
    plan = exact(lengths, documents, CAPACITY)
    stream = [(d, i) for d, n in zip(documents.tolist(), lengths.tolist(), strict=True) for i in range(n)]
    pieces = zip(plan.document.tolist(), plan.begin.tolist(), plan.length.tolist(), strict=True)
    assert [(d, b + i) for d, b, n in pieces for i in range(n)] == stream
    fill = plan.fill()
    assert (fill[:-1] == CAPACITY).all() and 0 < fill[-1] <= CAPACITY and (plan.length > 0).all()


def test_no_documents_make_no_packs():
    nothing = np.empty(0, dtype=np.int64)
    for plan in (best_fit(nothing, nothing, 8), exact(nothing, nothing, 8)):
        assert plan.num_packs == 0 and len(plan.fill()) == 0
