"""The example configs of the biggest models, built as a rank of the machine they are meant for would."""

from pathlib import Path

import pytest

from xtuner.config import TrainConfig, load_config
from xtuner.engine.trainer import resolve_model
from xtuner.errors import ConfigError
from xtuner.parallel import build_layout
from xtuner.plan.device import get_device
from xtuner.plan.fake_world import fake_tensors, fake_world
from xtuner.plan.simulate import build_rank, simulate

H800 = get_device("h800-80g")
EXAMPLES = Path(__file__).parents[2] / "examples"
# ranks, parameters as published
MEANT_FOR = {
    "pretrain_qwen3_235b": (256, 235e9),
    "pretrain_deepseek_v3": (512, 671e9),
    "pretrain_kimi_k2": (1024, 1.04e12),
}


def read(example, *overrides):
    return load_config(str(EXAMPLES / f"{example}.toml"), list(overrides), TrainConfig).config


@pytest.mark.parametrize("example", MEANT_FOR)
def test_builds_at_full_depth(example):
    cfg, (num_ranks, published) = read(example), MEANT_FOR[example]
    arch, _ = resolve_model(cfg)
    with fake_world(num_ranks, H800.per_node) as world:
        layout = build_layout(cfg.parallel, arch, world)
        with fake_tensors():
            parameters = list(build_rank(cfg, arch, layout, world).parameters())
            total, mine = sum(p.numel() for p in parameters), sum(p.to_local().numel() for p in parameters)
    assert total == pytest.approx(published, rel=0.02)
    assert mine * num_ranks == pytest.approx(total, rel=0.001)


@pytest.mark.parametrize(
    ("example", "overrides"),
    [
        ("pretrain_qwen3_235b", []),
        ("pretrain_qwen3_235b", ["fp8.enabled=true"]),
        ("pretrain_deepseek_v3", []),
        ("pretrain_kimi_k2", []),
    ],
)
def test_steps_with_few_blocks(example, overrides):
    cfg = read(example, *overrides)
    arch, _ = resolve_model(cfg)
    few = arch.model_copy(update={"num_hidden_layers": 4, "dense_layers": arch.dense_layers[:1]})
    run = simulate(cfg, few, 64, H800, imbalance=1.5)
    assert 0 < run.tracker.peak.device < H800.memory_gib * 2**30
    assert run.tracker.host_peak > 0


def test_float8_needs_widths_that_latent_attention_has_not():
    cfg = read("pretrain_deepseek_v3", "fp8.enabled=true")
    few = resolve_model(cfg)[0].model_copy(update={"num_hidden_layers": 1})
    with pytest.raises(ConfigError, match="576 x 7168 matrices, but float8 needs multiples of 128"):
        simulate(cfg, few, 64, H800)
