"""CONFIG files, overrides and their errors."""

import json

import pytest

from xtuner.config import ScheduleConfig, TrainConfig, describe_fields, load_config, save_config
from xtuner.config.base import field_paths
from xtuner.errors import ConfigError

MINIMAL = {"model": {"name": "qwen3-0.6b"}, "data": {"train": ["a.jsonl"]}, "steps": 10}


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(MINIMAL))
    return str(path)


def load(source, *overrides):
    return load_config(source, overrides, TrainConfig).config


def test_three_kinds_of_file_give_the_same_tree(tmp_path, minimal):
    toml = tmp_path / "run.toml"
    toml.write_text('steps = 10\n[model]\nname = "qwen3-0.6b"\n[data]\ntrain = ["a.jsonl"]\n')
    python = tmp_path / "run.py"
    python.write_text(f"from xtuner.config import TrainConfig\nconfig = TrainConfig.parse({MINIMAL!r})\n")
    assert load(minimal) == load(str(toml)) == load(str(python))


def test_saved_config_is_a_config_again(tmp_path, minimal):
    config = load(minimal, "optim.lr=3e-4", "log.reference_losses.unigram=6.5")
    save_config(config, tmp_path / "resolved.json")
    assert load(str(tmp_path / "resolved.json")) == config


def test_overrides(minimal):
    config = load(minimal, "optim.lr=0.5", "data.train=x.jsonl,y.jsonl", "run_dir=out", "optim.betas=[0.8,0.9]")
    assert config.optim.lr == 0.5 and config.optim.betas == (0.8, 0.9)
    assert [str(p) for p in config.data.train] == ["x.jsonl", "y.jsonl"] and str(config.run_dir) == "out"


def test_python_config_keeps_its_prepare_hook(tmp_path):
    python = tmp_path / "run.py"
    python.write_text(
        f"from xtuner.config import TrainConfig\nconfig = TrainConfig.parse({MINIMAL!r})\n"
        "def prepare(config): return config\n"
    )
    loaded = load_config(str(python), (), TrainConfig)
    assert loaded.prepare(loaded.config) is loaded.config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"optim\.learning_rate: unknown field; the nearest valid field is optim\.\w+"),
        ("stepz=1", "stepz: unknown field; the nearest valid field is steps"),
        ("optim.lr=fast", r"optim\.lr='fast': Input should be a valid number"),
        ("steps=-1", "steps=-1: Input should be greater than 0"),
        ("optim.lr", r"optim\.lr: an override has the form key\.sub=value"),
        ("schedule.warmup_steps=11", r"schedule\.warmup_steps=11 \+ schedule\.decay_steps=0 exceed steps=10"),
        ("model.path=/x", "model=.*: give exactly one of name, path, arch; got name and path"),
        ("schedule.kind=wsd", "schedule.kind=wsd needs schedule.decay_steps > 0"),
    ],
)
def test_bad_field(minimal, override, message):
    with pytest.raises(ConfigError, match=message):
        load(minimal, override)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml: no such config file"):
        load(str(tmp_path / "nothing.toml"))
    with pytest.raises(ConfigError, match=r"nothing\.py: no such config file"):
        load(str(tmp_path / "nothing.py"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"steps": ')
    with pytest.raises(ConfigError, match=r"broken\.json: Expecting value"):
        load(str(broken))
    python = tmp_path / "empty.py"
    python.write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"empty\.py: must define `config`, a TrainConfig"):
        load(str(python))
    with pytest.raises(ConfigError, match="CONFIG=quickstrat: neither a .* nor a recipe; recipes: .*quickstart"):
        load("quickstrat")


def test_missing_field_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"steps": 1, "data": {}}')
    with pytest.raises(ConfigError, match="model: required, but not given"):
        load(str(path))


def test_every_field_has_a_meaning(minimal):
    rows = describe_fields(load(minimal))
    names = [name for name, *_ in rows]
    assert {"optim.lr", "data.packing", "schedule.kind"} <= set(names) <= set(field_paths(TrainConfig))
    assert all(meaning for *_, meaning in rows)


def test_moe_section_must_fit_the_family(minimal):
    arch = dict(
        family="qwen3_moe", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    )
    with pytest.raises(ConfigError, match="family=qwen3_moe needs moe section"):
        TrainConfig.parse(MINIMAL | {"model": {"arch": arch}})
    arch["moe"] = dict(num_experts=4, num_experts_per_tok=5, moe_intermediate_size=8)
    with pytest.raises(ConfigError, match="num_experts_per_tok=5 exceeds num_experts=4"):
        TrainConfig.parse(MINIMAL | {"model": {"arch": arch}})


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        ScheduleConfig().kind = "linear"
