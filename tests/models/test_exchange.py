"""A saved directory of ours is a model of transformers' own, and the other way round."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.hf_models import CASES, make_hf, make_ours
from xtuner.checkpoint.hf import load_hf, save_hf
from xtuner.models import build_model, config_from_hf, config_to_hf, hf_map

IDS = torch.arange(1, 41)
PACKING = (torch.arange(40)[None], torch.tensor([0, 40], dtype=torch.int32), 40)


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_transformers_loads_what_we_save(family, shape, tmp_path):
    ours = make_ours(make_hf(family, shape))
    save_hf(ours, hf_map(ours.cfg), tmp_path / "hf", config=config_to_hf(ours.cfg))
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
        torch.testing.assert_close(ours(IDS, *PACKING).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_we_load_what_transformers_saves(family, shape, tmp_path):
    theirs = make_hf(family, shape)
    theirs.save_pretrained(tmp_path)
    cfg = config_from_hf(tmp_path)
    ours = build_model(cfg)
    load_hf(ours, hf_map(cfg), tmp_path)
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
        torch.testing.assert_close(ours(IDS, *PACKING).logits, expected, rtol=0, atol=1e-4)


def test_config_without_the_new_field_names_is_read_by_transformers(tmp_path):
    """Both spellings are written; readers that know only the old ones must find everything, too."""
    theirs = make_hf("qwen3_moe", "7 experts top-3, raw weights")
    ours = make_ours(theirs)
    old = {k: v for k, v in config_to_hf(ours.cfg).items() if k not in ("rope_parameters", "num_local_experts")}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert config_from_hf(tmp_path) == ours.cfg
    read = AutoModelForCausalLM.from_config(type(theirs.config).from_pretrained(tmp_path)).config
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "head_dim"):
        assert getattr(read, name) == getattr(theirs.config, name), name
    assert read.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
