"""The benchmark runs, compares the right things, and refuses to compare different ones."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_a_different_loss_stops_it(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_e2e", BENCH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_e2e", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    sides = [module.Side(name, None, None, losses=losses) for name, losses in (("a", [2.0]), ("b", [2.001]))]
    with pytest.raises(AssertionError, match="step 0: loss 2.0 of xtuner, 2.001 of b"):
        module.check_losses(sides, torch.float32)
