"""The engine's step on tensors without data: the same bytes as with data, and for the biggest models a plan."""

import re
import subprocess
import sys

import pytest
import torch

from xtuner.config import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ModelSource,
    ParallelConfig,
    TrainConfig,
    with_overrides,
)
from xtuner.config.train import Fp8Config, OptimConfig
from xtuner.errors import ConfigError
from xtuner.models import SIZES
from xtuner.plan import internals
from xtuner.plan.advice import advice
from xtuner.plan.device import DEVICES, get_device
from xtuner.plan.simulate import simulate

H800 = get_device("h800-80g")
ARCHS = SIZES | {
    "wide": ModelConfig.parse({
        "family": "qwen3_moe", "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2,
        "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    }),
}  # fmt: skip


def config(name="qwen3-moe-tiny", tokens=64, parallel=None, memory=None, fp8=False, optim="adamw"):
    return TrainConfig(
        model=ModelSource(name=name), data=DataConfig(pack_max_length=tokens), steps=1,
        parallel=ParallelConfig(**parallel or {}), memory=MemoryConfig(**memory or {}),
        fp8=Fp8Config(enabled=fp8), optim=OptimConfig(kind=optim),
    )  # fmt: skip


CASES = {
    "FSDP 2": ("qwen3-moe-tiny", 2, {}, {}),
    "FSDP 4, bfloat16": ("qwen3-moe-tiny", 4, {"compute_dtype": "bfloat16"}, {"reduce_dtype": "bfloat16"}),
    "EP 2": ("qwen3-moe-tiny", 2, {"ep_size": 2}, {}),
    "EP 2 x FSDP 2, recomputed": ("qwen3-moe-tiny", 4, {"ep_size": 2}, {"checkpointing": "full"}),
    "SP 2": ("qwen3-moe-tiny", 2, {"sp_size": 2}, {}),
    "dense, selective": ("qwen3-tiny", 2, {}, {"checkpointing": "selective"}),
    "latent attention": ("deepseek-v3-tiny", 2, {"ep_size": 2}, {"checkpointing": "full", "offload_activations": True}),
    "optimizer on the host": ("qwen3-moe-tiny", 2, {}, {"offload_optimizer": True}),
    "all on the host": ("qwen3-moe-tiny", 2, {}, {"offload_parameters": True}),
    "float8": ("wide", 2, {}, {}, {"fp8": True}),
    "float8, cut blocks, EP 2, recomputed": ("wide", 4, {"ep_size": 2}, {"checkpointing": "full"}, {"fp8": True}),
    "Muon": ("wide", 2, {}, {}, {"optim": "muon"}),
    "Muon, EP 2 x FSDP 2": ("wide", 4, {"ep_size": 2}, {}, {"optim": "muon"}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_bytes_as_with_data(case):
    name, ranks, parallel, memory, *more = CASES[case]
    cfg, arch = config(name, 64, parallel, memory, **(more[0] if more else {})), ARCHS[name]
    torch.manual_seed(0)
    trackers = [simulate(cfg, arch, ranks, H800, document=16, fake=fake).tracker for fake in (True, False)]
    assert trackers[0].peak == trackers[1].peak, [t.peak for t in trackers]
    assert trackers[0].phase_peaks == trackers[1].phase_peaks
    assert trackers[0].host_peak == trackers[1].host_peak
    assert trackers[0].timeline == trackers[1].timeline


def test_imbalance_costs_memory_and_time():
    cfg, arch = config(tokens=512, parallel={"ep_size": 4}), SIZES["qwen3-moe-tiny"]
    even, skewed = (simulate(cfg, arch, 4, H800, imbalance=load) for load in (1.0, 1.5))
    assert skewed.tracker.peak.device > even.tracker.peak.device
    assert skewed.clock.seconds["forward", "grouped"] > even.clock.seconds["forward", "grouped"]


def test_low_precision_reduction_halves_its_traffic():
    runs = [
        simulate(config(memory={"reduce_dtype": dtype}), SIZES["qwen3-moe-tiny"], 16, H800)
        for dtype in ("float32", "bfloat16")
    ]
    for link in ("link", "network"):
        full, half = (run.clock.traffic["reduce_scatter_base", link] for run in runs)
        assert half == pytest.approx(full / 2)


def test_arithmetic_of_a_step_is_the_formula():
    """What operators count is what a token is said to cost, but for routers, which count as memory-bound."""
    from xtuner.models import flops_per_token

    cfg, arch = config("qwen3-tiny", tokens=256), SIZES["qwen3-tiny"]
    run = simulate(cfg, arch, 2, H800)
    # Attention's backward does five products for the forward's two, not four.
    attention = 0.5 * 2 * 256 * arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim
    assert run.clock.flops / 256 == pytest.approx(flops_per_token(arch, 256) + attention, rel=0.01)


def test_plan_command(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        'steps = 1\n[model]\nname = "qwen3-30b-a3b"\n[data]\npack_max_length = 4096\n'
        '[parallel]\ncompute_dtype = "bfloat16"\nep_size = 8\n'
    )
    few = ["model.name=qwen3-moe-tiny", "model.path=null"]
    command = [sys.executable, "-m", "xtuner.run", "plan", str(path), *few, "--gpus", "8", "--device", "a100-80g"]
    done = subprocess.run([*command, "--png", str(tmp_path / "plan.png")], capture_output=True, text=True, timeout=200)
    text = done.stdout
    assert done.returncode == 0, done.stderr
    assert "fits" in text and "tokens/device/s" in text and "alltoall_base" in text
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_run_that_does_not_fit_gets_advice(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('steps = 1\n[model]\nname = "qwen3-0.6b"\n[data]\npack_max_length = 262144\n')
    command = [sys.executable, "-m", "xtuner.run", "plan", str(path), "--gpus", "8", "--document", "4096"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout
    advised = done.stdout.split("what would save")[1]
    assert advised.index("memory.checkpointing=full") < advised.index("memory.offload_optimizer=true")


def test_advice_is_what_the_whole_model_saves():
    """Advice looks at few of the blocks."""
    deep = SIZES["qwen3-tiny"].model_copy(update={"num_hidden_layers": 7})
    cfg = config("qwen3-tiny", tokens=2048, parallel={"compute_dtype": "bfloat16"})
    advised = advice(cfg, deep, 4, H800, document=512)
    assert [size for _, size in advised] == sorted((size for _, size in advised), reverse=True)
    cfgs = [cfg, with_overrides(cfg, ["memory.checkpointing=full"])]
    before, after = (simulate(c, deep, 4, H800, document=512).tracker.peak.device for c in cfgs)
    assert dict(advised)["memory.checkpointing=full"] == pytest.approx(before - after, rel=0.15)


def test_every_device_is_described():
    assert {"h100-80g", "h800-80g", "h200-141g", "a100-80g", "b200-180g", "ascend-910b-64g", "ascend-a3-64g"} == set(
        DEVICES
    )


def test_float8_halves_the_gathers_of_bfloat16():
    """But not those of embedding and head, which stay."""
    few = ARCHS["wide"].model_copy(update={"vocab_size": 128})
    cfgs = [config("wide", 64, {"compute_dtype": "bfloat16"}, fp8=enabled) for enabled in (False, True)]
    plain, float8 = (simulate(cfg, few, 2, H800) for cfg in cfgs)
    gathers = [run.clock.traffic["allgather_base", "link"] for run in (plain, float8)]
    assert gathers[1] == pytest.approx(gathers[0] / 2, rel=0.15)
    assert sum(s for (_, what), s in float8.clock.seconds.items() if what == "grouped_fp8") > 0
    assert not any(what == "grouped" for _, what in float8.clock.seconds)


def test_float8_where_there_is_none():
    with pytest.raises(ConfigError, match="a100-80g does not multiply in float8"):
        simulate(config("wide", fp8=True), ARCHS["wide"], 2, get_device("a100-80g"))
    with pytest.raises(ConfigError, match="multiples of 128"):
        simulate(config(fp8=True), SIZES["qwen3-moe-tiny"], 2, H800)


def test_muon_keeps_half_the_state():
    """Of the matrices inside the layers; what the exchanges need beside it is given back after the update."""
    few = ARCHS["wide"].model_copy(update={"vocab_size": 128})
    runs = [simulate(config("wide", 8192, optim=kind), few, 2, H800).tracker for kind in ("adamw", "muon")]
    assert all(run.peak_phase == "backward" for run in runs)
    adamw, muon = (run.peak.by_kind["optimizer"] for run in runs)
    assert muon == pytest.approx(adamw / 2, rel=0.1)


def test_a_torch_that_changed_inside_is_named(monkeypatch):
    monkeypatch.delattr(internals.FSDPParamGroup, "unshard")
    expected = f"torch {re.escape(torch.__version__)} differs.*FSDPParamGroup has no unshard"
    with pytest.raises(ConfigError, match=expected):
        simulate(config(), SIZES["qwen3-moe-tiny"], 2, H800)
