"""Sizes, configurations and checkpoint names."""

import pytest

from tests.models.hf_models import CASES, make_hf, split_experts
from xtuner.errors import CheckpointError, ConfigError
from xtuner.models import SIZES, build_model, config_from_hf, config_to_hf, flops_per_token, hf_map

# Billions of parameters in the model cards: total, and active per token for the mixtures.
MODEL_CARDS = {"qwen3-0.6b": 0.6, "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.0}


@pytest.mark.parametrize("name", SIZES)
def test_config_round_trip(name):
    assert config_from_hf(config_to_hf(SIZES[name])) == SIZES[name]


@pytest.mark.parametrize(("name", "billions"), MODEL_CARDS.items())
def test_parameter_counts_of_the_model_cards(name, billions):
    count = sum(p.numel() for p in build_model(SIZES[name], "meta").parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(("name", "billions"), [("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22.0)])
def test_active_parameters_of_the_model_cards(name, billions):
    cfg = SIZES[name]
    embedding = cfg.vocab_size * cfg.hidden_size
    assert (flops_per_token(cfg, context=0) / 6 + embedding) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", ["qwen3-moe-tiny", "qwen3-tiny", "llama-tiny", "smollm2-135m", "qwen3-235b-a22b"])
def test_every_row_of_every_parameter_has_one_name(name):
    cfg = SIZES[name]
    names = hf_map(cfg)
    parameters = dict(build_model(cfg, "meta").named_parameters())
    assert names.keys() == parameters.keys()
    theirs = [part.hf_name for parts in names.values() for part in parts]
    assert len(theirs) == len(set(theirs))
    for ours, parts in names.items():
        row = 0
        for part in parts:
            assert part.row_start == row
            row += part.num_rows
        assert row == parameters[ours].shape[0]


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_names_are_those_of_transformers(family, shape):
    model = make_hf(family, shape)
    ours = {part.hf_name for parts in hf_map(config_from_hf(model.config.to_dict())).values() for part in parts}
    theirs = set(split_experts(model.state_dict()))
    if model.config.tie_word_embeddings:
        theirs -= {"lm_head.weight"}
    assert ours == theirs


def test_old_and_new_field_names():
    new = config_to_hf(SIZES["qwen3-moe-tiny"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    newest = {k: v for k, v in new.items() if k not in ("rope_theta", "rope_scaling", "num_experts")}
    newest["num_local_experts"] = new["num_experts"]
    assert config_from_hf(old) == config_from_hf(newest) == SIZES["qwen3-moe-tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2: supported are llama, qwen3, qwen3_moe"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: supported is silu"),
        ({"use_sliding_window": True}, "use_sliding_window=True: only full attention is supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*: only full attention is supported"),
        ({"mlp_bias": True}, "mlp_bias=true: biases in the feed-forward layer are not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: supported is 1.0"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor=0.25: supported is 1.0",
        ),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "required, but not given: factor"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type=longrope: supported are default, linear, yarn"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(config_to_hf(SIZES["qwen3-tiny"]) | change)


def test_null_means_the_default():
    hf = config_to_hf(SIZES["qwen3-moe-tiny"])
    names = ["partial_rotary_factor", "layer_types", "decoder_sparse_step", "head_dim", "mlp_only_layers"]
    absent = dict.fromkeys(names)
    cfg = SIZES["qwen3-moe-tiny"]
    assert config_from_hf(hf | absent) == cfg.model_copy(update={"head_dim": cfg.hidden_size // 4})
    assert config_from_hf(hf | {"norm_topk_prob": None}).moe.norm_topk_prob is False


def test_dense_layers_must_exist():
    hf = config_to_hf(SIZES["qwen3-moe-tiny"])
    assert config_from_hf(hf | {"decoder_sparse_step": 2}).dense_layers == (0,)
    values = SIZES["qwen3-moe-tiny"].model_dump() | {"dense_layers": (0, 2)}
    with pytest.raises(ConfigError, match=r"dense_layers=\(0, 2\) must name layers 0…1 of an MoE model"):
        type(SIZES["qwen3-moe-tiny"]).parse(values)
    with pytest.raises(ConfigError, match="required, but not given: num_experts_per_tok"):
        config_from_hf({k: v for k, v in hf.items() if k != "num_experts_per_tok"})


def test_impossible_values_are_config_errors():
    hf = config_to_hf(SIZES["qwen3-moe-tiny"])
    for change, message in [
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds num_experts=8"),
        ({"rope_theta": -1.0, "rope_parameters": None}, "rope.theta=-1.0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config_from_hf(hf | change)


def test_missing_fields_and_files(tmp_path):
    hf = config_to_hf(SIZES["qwen3-tiny"])
    del hf["hidden_size"]
    with pytest.raises(ConfigError, match="required, but not given: hidden_size"):
        config_from_hf(hf)
    with pytest.raises(CheckpointError, match=r"config\.json: not a readable Hugging Face config"):
        config_from_hf(tmp_path)
