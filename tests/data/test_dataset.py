import numpy as np
import pytest

from xtuner.data import build_dataset
from xtuner.errors import DataError


def with_(cfg, **fields):
    return type(cfg).parse(cfg.model_dump() | fields)


def documents_of(dataset):
    return [ids.tolist() for pack in (dataset[i] for i in range(len(dataset))) for ids in pack.ids]


def test_packs_hold_every_document_once(write_jsonl, texts, cfg, tokenizer_dir):
    files = [write_jsonl(texts(20, seed=1), "a.jsonl"), write_jsonl(texts(25, seed=2), "b.jsonl")]
    dataset = build_dataset(files, cfg, tokenizer_dir)
    stored = [f.ids[f.offsets[i] : f.offsets[i + 1]].tolist() for f in dataset.files for i in range(f.num_documents)]
    assert sorted(documents_of(dataset)) == sorted(stored)
    assert dataset.num_documents == 45 and dataset.num_tokens == sum(map(len, stored))
    assert dataset.stats.num_learned_tokens == dataset.num_tokens
    assert max(dataset[i].num_tokens for i in range(len(dataset))) <= cfg.pack_max_length
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_exact_packing_fills_every_pack(write_jsonl, texts, cfg, tokenizer_dir):
    path = write_jsonl(texts(40, longest=60))
    dataset = build_dataset([path], with_(cfg, packing="exact"), tokenizer_dir)
    sizes = [dataset[i].num_tokens for i in range(len(dataset))]
    assert set(sizes[:-1]) == {cfg.pack_max_length}
    assert np.concatenate([np.concatenate(dataset[i].ids) for i in range(len(dataset))]).tolist() == (
        dataset.files[0].ids.tolist()
    )


def test_masks_travel_with_their_documents(write_jsonl, cfg, tokenizer_dir):
    turns = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
    dataset = build_dataset([write_jsonl([{"messages": turns}, {"text": "gamma"}])], cfg, tokenizer_dir)
    (pack,) = (dataset[0],)
    chat = next(i for i, mask in enumerate(pack.masks) if not mask.all())
    assert pack.masks[1 - chat].all()
    assert 0 < pack.masks[chat].sum() < len(pack.ids[chat])
    assert dataset.stats.num_learned_tokens == sum(int(mask.sum()) for mask in pack.masks)


def long_lines(write_jsonl):
    return write_jsonl([{"text": "alpha"}, {"text": "beta " * 90}, {"text": "gamma " * 80}])


def test_a_document_longer_than_the_pack_is_an_error(write_jsonl, cfg, tokenizer_dir):
    path = long_lines(write_jsonl)
    length = int(np.diff(build_dataset([path], with_(cfg, packing="exact"), tokenizer_dir).files[0].offsets).max())
    expected = (
        rf"data.jsonl, line 2: a document of {length} tokens exceeds data.pack_max_length=64 \(and 1 more documents "
        rf"are too long\): raise it to at least {length}, or choose data.on_long=truncate"
    )
    with pytest.raises(DataError, match=expected):
        build_dataset([path], cfg, tokenizer_dir)


def test_long_documents_can_be_skipped_or_truncated(write_jsonl, cfg, tokenizer_dir):
    path = long_lines(write_jsonl)
    skipped = build_dataset([path], with_(cfg, on_long="skip"), tokenizer_dir)
    assert skipped.num_documents == 1 and skipped.stats.num_skipped_long == 2
    assert skipped.stats.num_learned_tokens == skipped.num_tokens == skipped[0].num_tokens
    truncated = build_dataset([path], with_(cfg, on_long="truncate"), tokenizer_dir)
    assert truncated.stats.num_truncated == 2 and truncated.num_documents == 3
    assert sorted(len(d) for d in documents_of(truncated))[1:] == [64, 64]
    assert truncated.stats.num_learned_tokens == truncated.num_tokens


def test_truncation_that_leaves_nothing_to_learn_is_a_skip(write_jsonl, cfg, tokenizer_dir):
    turns = [{"role": "user", "content": "beta " * 90}, {"role": "assistant", "content": "yes"}]
    path = write_jsonl([{"text": "alpha"}, {"messages": turns}])
    stats = build_dataset([path], with_(cfg, on_long="truncate"), tokenizer_dir).stats
    assert (stats.num_documents, stats.num_skipped_long, stats.num_truncated) == (1, 1, 0)


def test_nothing_to_train_on(write_jsonl, cfg, tokenizer_dir, tmp_path):
    with pytest.raises(DataError, match="no data files given: name at least one .jsonl or .txt file in data.train"):
        build_dataset([], cfg, tokenizer_dir)
    with pytest.raises(DataError, match="no document to train on in .*empty.jsonl: empty"):
        build_dataset([write_jsonl([], "empty.jsonl")], cfg, tokenizer_dir)
    bad = write_jsonl(["x", "y"], "bad.jsonl")
    with pytest.raises(DataError, match="all 2 lines are malformed, first .*bad.jsonl, line 1: not valid JSON"):
        build_dataset([bad], with_(cfg, on_malformed="skip"), tokenizer_dir)
    long = write_jsonl([{"text": "beta " * 90}], "long.jsonl")
    with pytest.raises(DataError, match="all 1 are longer than data.pack_max_length"):
        build_dataset([long], with_(cfg, on_long="skip"), tokenizer_dir)
    with pytest.raises(DataError, match="nowhere.jsonl: no such data file"):
        build_dataset([tmp_path / "nowhere.jsonl"], cfg, tokenizer_dir)
