import numpy as np
import pytest
import torch

from xtuner.data import Loader, Pack, build_dataset, collate
from xtuner.errors import ConfigError


def pack(*documents, learned=None):
    ids = [np.array(d, dtype=np.int32) for d in documents]
    masks = [np.ones(len(d), dtype=np.uint8) for d in documents] if learned is None else learned
    return Pack(ids, [np.array(m, dtype=np.uint8) for m in masks])


def test_collate_puts_documents_end_to_end():
    batch = collate([pack([5, 6, 7], [8]), pack([9, 10], learned=[[0, 1]])])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.labels.tolist() == [6, 7, 0, 0, 10, 0]
    assert batch.loss_weights.tolist() == [1, 1, 0, 0, 1, 0]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.max_seqlen == 3 and batch.num_tokens == 6
    dtypes = (torch.int64, torch.int64, torch.float32, torch.int64, torch.int32)
    assert dtypes == tuple(
        getattr(batch, f).dtype for f in ("input_ids", "labels", "loss_weights", "positions", "cu_seqlens")
    )


def test_a_weight_belongs_to_the_token_that_is_predicted():
    batch = collate([pack([1, 2, 3, 4, 5], learned=[[1, 0, 1, 1, 0]])])
    learned = batch.labels[batch.loss_weights == 1]
    assert learned.tolist() == [3, 4]  # token 1 has no predecessor


@pytest.mark.parametrize("seed", range(10))
def test_collate_of_random_packs(seed):
    rng = np.random.default_rng(seed)
    packs = [
        pack(*documents, learned=[rng.integers(0, 2, len(d)) for d in documents])
        for documents in (
            [rng.integers(1, 99, rng.integers(1, 9)) for _ in range(rng.integers(1, 5))] for _ in range(3)
        )
    ]
    batch = collate(packs)
    bounds = batch.cu_seqlens.tolist()
    assert bounds[-1] == batch.num_tokens and batch.max_seqlen == max(np.diff(bounds))
    documents = [(d, m) for p in packs for d, m in zip(p.ids, p.masks, strict=True)]
    for (ids, mask), start, end in zip(documents, bounds, bounds[1:], strict=False):
        assert batch.input_ids[start:end].tolist() == ids.tolist()
        assert batch.labels[start : end - 1].tolist() == ids[1:].tolist()
        assert batch.loss_weights[start:end].tolist() == [*mask[1:].tolist(), 0]
        assert batch.positions[0, start:end].tolist() == list(range(end - start))


@pytest.fixture
def dataset(write_jsonl, texts, cfg, tokenizer_dir):
    made = build_dataset([write_jsonl(texts(60))], cfg, tokenizer_dir)
    assert len(made) == 11  # odd, so that epochs end inside steps
    return made


def stream(dataset, steps, world_size, micro, state=None, **kwargs):
    """Per step, the micro-batches of all ranks in the order of the packs they came from, joined."""
    loaders = [
        Loader(dataset, global_batch_size=8, micro_batch_size=micro, rank=r, world_size=world_size, **kwargs)
        for r in range(world_size)
    ]
    for loader in loaders:
        if state:
            loader.load_state_dict(state)
    result = []
    for _ in range(steps):
        ranks = [loader.next_step() for loader in loaders]
        assert {len(batches) for batches in ranks} == {8 // (world_size * micro)}
        result.append([batch.input_ids.tolist() for batches in zip(*ranks, strict=True) for batch in batches])
    return result, loaders[0].state_dict()


def joined(steps):
    return [[token for micro in step for token in micro] for step in steps]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_stream_does_not_depend_on_the_number_of_ranks(dataset, shuffle):
    expected, _ = stream(dataset, 6, 1, 1, seed=3, shuffle=shuffle)
    for world_size in (1, 2, 4):
        for micro in (1, 2):
            actual, state = stream(dataset, 6, world_size, micro, seed=3, shuffle=shuffle)
            assert joined(actual) == joined(expected)
            assert state == {"packs_consumed": 48}


def test_four_ranks_see_what_one_rank_sees_in_a_larger_micro_batch(dataset):
    one, _ = stream(dataset, 3, 1, 4, seed=3)
    four, _ = stream(dataset, 3, 4, 1, seed=3)
    for step_one, step_four in zip(one, four, strict=True):
        assert step_one == [sum(step_four[i : i + 4], []) for i in (0, 4)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_anywhere_continues_the_same_stream(dataset, shuffle):
    whole, _ = stream(dataset, 8, 2, 1, seed=5, shuffle=shuffle)
    for done in range(8):
        _, state = stream(dataset, done, 2, 1, seed=5, shuffle=shuffle)
        for world_size in (1, 2, 4):
            rest, _ = stream(dataset, 8 - done, world_size, 1, state, seed=5, shuffle=shuffle)
            assert joined(rest) == joined(whole[done:])


def packs_seen(dataset, epochs, **kwargs):
    loader = Loader(dataset, global_batch_size=1, micro_batch_size=1, **kwargs)
    flat = [tuple(loader.next_step()[0].input_ids.tolist()) for _ in range(epochs * len(dataset))]
    assert loader.epoch == epochs
    return [flat[i * len(dataset) : (i + 1) * len(dataset)] for i in range(epochs)]


def test_every_epoch_holds_every_pack_once_in_a_new_order(dataset):
    everything = sorted(tuple(collate([dataset[i]]).input_ids.tolist()) for i in range(len(dataset)))
    first, second = packs_seen(dataset, 2, seed=1)
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert packs_seen(dataset, 1, seed=2)[0] != first
    assert packs_seen(dataset, 1, seed=1)[0] == first


def test_without_shuffling_packs_come_in_order(dataset):
    first, second = packs_seen(dataset, 2, shuffle=False)
    assert first == second == [tuple(collate([dataset[i]]).input_ids.tolist()) for i in range(len(dataset))]


def test_impossible_batch_sizes(dataset):
    with pytest.raises(
        ConfigError, match="global_batch_size=6 must be a positive multiple of micro_batch_size=2 x world"
    ):
        Loader(dataset, global_batch_size=6, micro_batch_size=2, world_size=2)
    with pytest.raises(ConfigError, match="rank=2 is not in 0..1"):
        Loader(dataset, global_batch_size=2, micro_batch_size=1, rank=2, world_size=2)
