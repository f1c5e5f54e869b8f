"""A checkpoint of many ranks becomes a Hugging Face directory without the model ever being in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.tiny import environment, make_tokenizer, tiny_config, write_config
from tests.parallel.convert_rank import make_arch, save_sharded
from xtuner.config import ModelConfig
from xtuner.models import build_model

MIB = 1 << 20
NUM_RANKS = 4


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """Two run directories, of a model of 1 layer and of 16."""
    directory = tmp_path_factory.mktemp("convert")
    make_tokenizer(directory / "tokenizer")
    for num_layers in (1, 16):
        ranks.run(save_sharded, NUM_RANKS, directory / str(num_layers), num_layers)
        config = tiny_config(directory, model={"arch": make_arch(num_layers)})
        write_config(directory / str(num_layers) / "config.json", config)
    return directory


def test_every_rank_writes_its_part(runs):
    sizes = [f.stat().st_size for f in (runs / "16" / "checkpoints" / "step-00000001").glob("*.distcp")]
    assert len(sizes) == NUM_RANKS and max(sizes) < 1.2 * min(sizes), sizes


def test_memory_is_bounded_by_the_portion_not_by_the_model(runs):
    command = [sys.executable, str(Path(__file__).with_name("convert_memory.py")), str(16 * MIB)]
    paths = [str(runs / name) for name in ("1", "hf-small", "16", "hf-large")]
    done = subprocess.run([*command, *paths], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    model_bytes = sum(f.stat().st_size for f in (runs / "16").rglob("*.distcp"))
    assert model_bytes > 200 * MIB
    assert large - small < 64 * MIB, f"{(large - small) / MIB:.0f} MiB more for a model of {model_bytes / MIB:.0f} MiB"
    print(f"{(large - small) / MIB:.0f} MiB more than for one layer, model of {model_bytes / MIB:.0f} MiB")


def test_values_are_those_of_the_ranks(runs):
    config = json.loads((runs / "hf-large" / "config.json").read_text())
    assert config["num_hidden_layers"] == 16 and config["dtype"] == "bfloat16"
    model = build_model(ModelConfig.parse(make_arch(16)))
    model.init_weights(0)
    stored = load_file(runs / "hf-large" / "model.safetensors")
    w13 = model.layers[7].moe.w13.detach().unflatten(0, (16, 2, 256))
    assert torch.equal(stored["model.layers.7.mlp.experts.5.up_proj.weight"], w13[5, 1].bfloat16())
    assert torch.equal(stored["lm_head.weight"], model.head.weight.detach().bfloat16())
