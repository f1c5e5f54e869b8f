"""The benchmark runs, compares the right things, and refuses to compare different ones."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xtuner

BENCH = Path(__file__).parents[2] / "bench/e2e.py"
TINY = "--layers 1 --hidden 64 --experts 4 --topk 2 --inter 16 --vocab 64 --batch 2 --seq 8 --steps 1 --threads 1"


def test_every_side_computes_the_same_loss(tmp_path):
    command = [sys.executable, str(BENCH), *TINY.split(), "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    report = json.loads((tmp_path / "out.json").read_text())
    names = [result["name"] for result in report["results"]]
    assert names == ["xtuner", *(f"transformers {i}" for i in ("grouped_mm", "eager", "batched_mm"))]
    assert report["largest_relative_loss_difference"] < 1e-4
    assert all(len(result["losses"]) == 2 for result in report["results"])
    ours, *others = (result["median_s"] for result in report["results"])
    assert report["speedup"]["median_s"] == pytest.approx(min(others) / ours, rel=0.3)  # both are rounded
    # 6 per token and weight: q, k, v, o of one head (two key heads would not fit), 2 experts of 4, router, head
    weights = 4 * 64 * 64 + 2 * 3 * 64 * 16 + 4 * 64 + 64 * 64
    share = report["share_of_dense_rate"]["with_weights"]
    assert share["matmul_gflop"] == round(6e-9 * 16 * weights, 1) and share["share_median"] > 0


@pytest.mark.long
def test_sides_in_processes_of_their_own(tmp_path):
    command = [sys.executable, str(BENCH), *TINY.split(), "--apart", "--implementations", "grouped_mm"]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, timeout=120, capture_output=True)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [result["name"] for result in report["results"]] == ["xtuner", "transformers grouped_mm"]
    assert report["largest_relative_loss_difference"] < 1e-4


def test_slow_rivals_may_stop_early(tmp_path):
    command = [sys.executable, str(BENCH), *TINY.split(), "--implementations", "grouped_mm", "--rival-steps", "1"]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, timeout=120, capture_output=True)
    ours, theirs = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(ours["losses"]) == 2 and len(theirs["losses"]) == 1 and theirs["median_s"] > 0


def test_curves_profile_and_emulation(tmp_path):
    modes = ["--curve", "--lr", "1e-3", "--profile"]
    command = [sys.executable, str(BENCH), *TINY.split(), *modes, "--json", str(tmp_path / "out.json")]
    if "avx2" in xtuner.build_info()["isas"]:
        command += ["--isa", "avx2"]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    report = json.loads((tmp_path / "out.json").read_text())
    assert all(len(result["losses"]) == 50 for result in report["results"])
    losses = report["results"][0]["losses"]
    assert losses[-1] < losses[0] - 0.1, "the curve must go somewhere"
    assert report["machine"]["emulated"] == ("avx2" if "--isa" in command else "native")
    for seconds in report["seconds_by_part"].values():
        missing = {"attention", "expert products", "dense projections", "head, cross-entropy", "norms"} - seconds.keys()
        assert not missing, "an operator's name has changed"


def test_a_different_loss_stops_it(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_e2e", BENCH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_e2e", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    sides = [module.Side(name, None, None, losses=losses) for name, losses in (("a", [2.0]), ("b", [2.001]))]
    with pytest.raises(AssertionError, match="step 0: loss 2.0 of xtuner, 2.001 of b"):
        module.check_losses(sides, torch.float32)
