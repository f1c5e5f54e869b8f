"""Directories that transformers wrote, read by us, and the other way round, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from tests.checkpoint.fsdp_rank import load_compute_save
from tests.models.hf_models import make_hf
from xtuner.checkpoint.hf import load_hf, save_hf
from xtuner.errors import CheckpointError
from xtuner.models import build_model, config_from_hf, config_to_hf, hf_map

CASES = [
    ("qwen3", "gqa2"),
    ("qwen3", "mqa, tied"),
    ("qwen3_moe", "7 experts top-3, raw weights"),
    ("qwen3_moe", "dense first layer, tied"),
    ("llama", "llama3 rope"),
    ("llama", "bias"),
]
LENGTH = 30
IDS = torch.randint(0, 97, (LENGTH,), generator=torch.Generator().manual_seed(2))


def our_logits(model):
    positions, cu_seqlens = torch.arange(LENGTH)[None], torch.tensor([0, LENGTH], dtype=torch.int32)
    with torch.no_grad():
        return model(IDS, positions, cu_seqlens, LENGTH).logits


def their_logits(model):
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def load_ours(path: Path):
    cfg = config_from_hf(path)
    model = build_model(cfg)
    load_hf(model, hf_map(cfg), path)
    return model


def save_ours(model, path: Path, **options) -> None:
    save_hf(model, hf_map(model.cfg), path, config=config_to_hf(model.cfg), **options)


@pytest.mark.parametrize(("family", "shape"), CASES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_we_read_what_transformers_wrote(tmp_path, family, shape, max_shard_size):
    theirs = make_hf(family, shape)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "30KB")
    torch.testing.assert_close(our_logits(load_ours(tmp_path)), their_logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "shape"), CASES)
@pytest.mark.parametrize("max_shard_bytes", [2 << 30, 30_000])
def test_transformers_reads_what_we_wrote(tmp_path, family, shape, max_shard_bytes):
    model = build_model(config_from_hf(make_hf(family, shape).config.to_dict()))
    model.init_weights(seed=5)
    save_ours(model, tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    problems = {kind: names for kind, names in info.items() if names}
    assert not problems
    torch.testing.assert_close(our_logits(model), their_logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_there_and_back_changes_no_bit(tmp_path, family, shape):
    model = build_model(config_from_hf(make_hf(family, shape).config.to_dict()))
    model.init_weights(seed=6)
    save_ours(model, tmp_path / "hf")
    for (name, before), after in zip(model.named_parameters(), load_ours(tmp_path / "hf").parameters(), strict=True):
        assert torch.equal(before, after), name


def test_the_dtype_on_disk_is_the_one_transformers_sees(tmp_path):
    model = build_model(config_from_hf(make_hf("qwen3", "gqa2").config.to_dict()))
    model.init_weights(seed=7)
    save_ours(model, tmp_path / "hf", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16


def test_weights_of_another_model_are_refused(tmp_path):
    make_hf("qwen3", "gqa2").save_pretrained(tmp_path)
    other = config_from_hf(make_hf("llama", "gqa2").config.to_dict())
    with pytest.raises(CheckpointError, match="4 tensors that this model does not have: model.layers.0.self_attn"):
        load_hf(build_model(other), hf_map(other), tmp_path)
    tied = config_from_hf(make_hf("qwen3", "mqa, tied").config.to_dict())
    with pytest.raises(CheckpointError, match=r"k_proj.weight has shape \[32, 48\], but the model needs \[16, 48\]"):
        load_hf(build_model(tied), hf_map(tied), tmp_path)


def test_two_fsdp_ranks(tmp_path):
    theirs = make_hf("qwen3_moe", "dense first layer, tied")
    theirs.save_pretrained(tmp_path / "theirs")
    mp.spawn(load_compute_save, (tmp_path, IDS), nprocs=2)
    for rank in range(2):
        logits = torch.load(tmp_path / f"logits-{rank}.pt")
        torch.testing.assert_close(logits, their_logits(theirs), rtol=0, atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for name, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
