"""Estimates against full depth, and what is searched with them."""

import argparse
from dataclasses import replace

import pytest

from tests.plan.test_simulate import H800, config
from xtuner.models import SIZES
from xtuner.plan import plan, search
from xtuner.plan.device import DEVICES, GIB
from xtuner.plan.extrapolate import estimate
from xtuner.plan.plan import make_plan
from xtuner.plan.search import LEANEST_FIRST, find_layouts, longest, print_search
from xtuner.plan.simulate import simulate

TINY, TOKENS, GPUS = SIZES["qwen3-moe-tiny"], 4096, 2


def full_depth(cfg, arch, gpus, device=H800):
    tokens = cfg.data.pack_max_length
    return make_plan(arch, cfg, simulate(cfg, arch, gpus, device, tokens), device, tokens)


@pytest.mark.parametrize(
    ("name", "parallel", "memory"),
    [
        ("qwen3-moe-tiny", {}, LEANEST_FIRST[0]),
        ("qwen3-moe-tiny", {"ep_size": 2}, LEANEST_FIRST[3]),
        ("deepseek-v3-tiny", {"ep_size": 2}, LEANEST_FIRST[0]),
    ],
)
def test_estimate_is_what_full_depth_says(name, parallel, memory):
    cfg = config(name, 65536, parallel, memory)
    arch = SIZES[name].model_copy(update={"num_hidden_layers": 9})
    expected, found = full_depth(cfg, arch, GPUS), estimate(cfg, arch, GPUS, H800, 65536, 1.0)
    assert found.peak == pytest.approx(expected.peak, rel=1e-4)
    assert found.seconds == pytest.approx(expected.step_seconds, rel=1e-4)


@pytest.fixture(scope="module")
def everything():
    return find_layouts(config(tokens=TOKENS), TINY, GPUS, H800, TOKENS, 1.0)


def test_all_layouts_best_first(everything):
    found = everything.fitting
    assert len(found) == everything.tried == 2 * len(LEANEST_FIRST)  # ep 1 and 2
    speeds = [candidate.tokens_per_second for candidate in found]
    assert speeds == sorted(speeds, reverse=True)
    peaks = {(c.cfg.parallel.ep_size, c.cfg.memory.checkpointing, c.cfg.memory.offload_activations): c.estimate.peak
             for c in found}  # fmt: skip
    for ep_size in (1, 2):
        by_technique = [peaks[ep_size, t["checkpointing"], t["offload_activations"]] for t in LEANEST_FIRST]
        assert by_technique == sorted(by_technique)


def test_those_that_do_not_fit_are_left_out(everything, capsys):
    middle = sorted(c.estimate.peak for c in everything.fitting)[3]
    device = replace(H800, memory_gib=middle / GIB)
    assert print_search(config(tokens=TOKENS), TINY, GPUS, device, TOKENS, 1.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 layouts fit 2 x h800-80g")
    best = next(c for c in everything.fitting if c.estimate.peak <= middle)
    assert lines[1].strip() == best.row()
    assert lines[5].startswith("at full depth fits")


def test_sequences_are_split_when_nothing_fits_whole(everything):
    device = replace(H800, memory_gib=(everything.leanest.estimate.peak - 1) / GIB)
    found = find_layouts(config(tokens=TOKENS), TINY, GPUS, device, TOKENS, 1.0)
    assert found.fitting and all(c.cfg.parallel.sp_size > 1 for c in found.fitting)


def test_advice_when_none_fits(capsys):
    device = replace(H800, memory_gib=2.5001)
    assert print_search(config(tokens=TOKENS), TINY, GPUS, device, TOKENS, 1.0) == 1
    text = capsys.readouterr().out
    assert text.startswith("none of 4 layouts fits 2 x h800-80g; the leanest: ep")
    assert "data.pack_max_length=2048" in text.split("what would save")[1]


@pytest.mark.long
def test_advice_when_state_alone_is_too_much(capsys, monkeypatch):
    monkeypatch.setattr(search, "find_layouts", lambda *_: pytest.fail("no layout needs to be tried"))
    assert print_search(config("qwen3-30b-a3b"), SIZES["qwen3-30b-a3b"], 4, H800, 64, 1.0) == 1
    text = capsys.readouterr().out
    assert text.startswith("weights, gradients and optimizer state alone are 113.7 GiB")
    assert "memory.offload_parameters=true" in text


def test_longest_fits_and_one_step_more_does_not():
    cfg = config(tokens=2048)
    device = replace(H800, memory_gib=full_depth(config(tokens=7 * 1024), TINY, GPUS).peak / GIB)
    found, document = longest(cfg, TINY, GPUS, device, None, 1.0)
    assert found.data.pack_max_length == document == 7 * 1024


@pytest.mark.parametrize("option", ["--search", "--longest"])
def test_command(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DEVICES, "h100-80g", replace(H800, memory_gib=2.6))
    path = tmp_path / "config.toml"
    path.write_text('steps = 1\n[model]\nname = "qwen3-moe-tiny"\n[data]\npack_max_length = 8192\n')
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    args = [str(path), "--gpus", "2", "--document", "1024", option]
    assert plan.main(parser.parse_args(args)) == 0
    assert {"--search": "at full depth fits", "--longest": "documents of 1,024"}[option] in capsys.readouterr().out
