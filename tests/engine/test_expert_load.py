"""What a run leaves about the load of its experts, and the routing bias through checkpoints and exports."""

import json

import pytest
import torch

from tests.engine.tiny import exported_weights, losses, tiny_config, write_config
from xtuner import run
from xtuner.engine.plot import plot_expert_load


def train(directory, name, *arguments, **fields):
    config = tiny_config(directory, run_dir=str(directory / name), **fields)
    assert run.main(["train", str(write_config(directory / f"{name}.json", config)), *arguments]) == 0
    return directory / name


def choices(run_dir):
    return torch.tensor(json.loads((run_dir / "expert_load.json").read_text())["choices_per_expert"])


BIAS = {"aux_loss": "none", "bias_update_rate": 0.01}


def test_load_and_bias_survive_a_resume(tmp_path, capsys):
    every = {"every": 4}
    whole = train(tmp_path, "whole", steps=8, loss=BIAS, checkpoint=every)
    assert "without the routing bias, for which qwen3_moe has no name" in capsys.readouterr().out
    assert (whole / "expert_load.png").stat().st_size > 5000
    counts = choices(whole)
    tokens = json.loads((whole / "summary.json").read_text())["num_tokens"]
    assert counts.shape == (2, 4) and counts.sum(1).tolist() == [2 * tokens] * 2
    # Killed after the checkpoint of step 4: its directory as it was then, and the records of steps beyond it.
    parts = train(tmp_path, "parts", steps=8, loss=BIAS, checkpoint=every)
    for name in ("step-00000008", "expert_load.png"):
        target = parts / "checkpoints" / name if name.startswith("step") else parts / name
        target.rename(tmp_path / name)
    train(tmp_path, "parts", "--resume", "auto", steps=8, loss=BIAS, checkpoint=every)
    assert losses(parts) == losses(whole) and torch.equal(choices(parts), counts)
    assert not any("bias" in name for name in exported_weights(parts))


def test_records_per_layer(tmp_path):
    run_dir = train(tmp_path, "run", steps=2)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    per_layer = [r for r in records if r["kind"] == "load_imbalance"]
    means = [r["load_imbalance"] for r in records if r["kind"] == "train"]
    assert [(r["layer_00"] + r["layer_01"]) / 2 for r in per_layer] == pytest.approx(means)


def test_a_dense_model_has_nothing_to_balance(tmp_path, capsys):
    config = tiny_config(tmp_path, model={"arch": None, "name": "llama-tiny"}, loss=BIAS)
    assert run.main(["train", str(write_config(tmp_path / "dense.json", config))]) == 2
    assert "loss.bias_update_rate=0.01: a dense model has no experts" in capsys.readouterr().err


def test_heat_map_of_experts_never_chosen(tmp_path):
    counts = torch.zeros(94, 128)
    counts[:, 3] = 5
    plot_expert_load(counts, range(94), tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 5000
