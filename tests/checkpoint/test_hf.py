"""The exchange itself, on a module small enough to see through; real families are in test_hf_families.py."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from xtuner.checkpoint.hf import load_hf, save_hf
from xtuner.errors import CheckpointError
from xtuner.parallel import leave_world

V, D, INTER, E = 11, 6, 5, 3  # odd, so that two ranks own different numbers of rows


@dataclass(frozen=True)
class Rows:
    hf_name: str
    row_start: int
    num_rows: int


class Toy(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(V, D, dtype=dtype)
        self.w13 = nn.Parameter(torch.empty(E * 2 * INTER, D, dtype=dtype))
        self.norm = nn.Parameter(torch.empty(D, dtype=dtype))
        for param in self.parameters():
            param.data.copy_(torch.randn(param.shape, generator=generator))


def toy_map() -> dict[str, list[Rows]]:
    experts = [(e, kind) for e in range(E) for kind in ("gate", "up")]
    return {
        "embed.weight": [Rows("model.embed_tokens.weight", 0, V)],
        "w13": [Rows(f"experts.{e}.{k}_proj.weight", i * INTER, INTER) for i, (e, k) in enumerate(experts)],
        "norm": [Rows("model.norm.weight", 0, D)],
    }


def save_toy(module: nn.Module, path: Path, **options) -> None:
    save_hf(module, toy_map(), path, config={"model_type": "toy", "eos_token_id": 7}, **options)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A directory of three shards."""
    save_toy(Toy(), tmp_path / "hf", max_shard_bytes=400)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) >= 3
    return tmp_path / "hf"


@pytest.mark.parametrize("max_shard_bytes", [1, 400, 1 << 30])
def test_round_trip_is_bit_exact(tmp_path, max_shard_bytes):
    save_toy(Toy(seed=1), tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    loaded = Toy(seed=2)
    load_hf(loaded, toy_map(), tmp_path / "hf")
    assert_equal(Toy(seed=1), loaded)
    assert (tmp_path / "hf/model.safetensors").exists() == (max_shard_bytes == 1 << 30)


def test_the_library_reads_what_we_stream(export):
    tensors = {}
    for file in sorted(export.glob("*.safetensors")):
        tensors |= load_file(file)
    expected = dict(Toy().named_parameters())
    assert torch.equal(tensors["model.embed_tokens.weight"], expected["embed.weight"])
    up_of_1 = expected["w13"][3 * INTER : 4 * INTER]
    assert torch.equal(tensors["experts.1.up_proj.weight"], up_of_1)
    index = json.loads((export / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())


def test_shards_respect_their_bound(export):
    for file in export.glob("*.safetensors"):
        assert sum(t.numel() * 4 for t in load_file(file).values()) <= 400


def test_dtype_is_cast_both_ways(tmp_path):
    save_toy(Toy(seed=3), tmp_path / "hf", dtype=torch.bfloat16)
    assert load_file(tmp_path / "hf/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    loaded = Toy(seed=4)
    load_hf(loaded, toy_map(), tmp_path / "hf")
    for x, y in zip(Toy(seed=3).parameters(), loaded.parameters(), strict=True):
        assert y.dtype == torch.float32 and torch.equal(x.bfloat16().float(), y)


def test_config_generation_config_and_tokenizer_files_are_written(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    (tmp_path / "tok/weights.bin").write_text("not a tokenizer file")
    save_toy(Toy(), tmp_path / "hf", tokenizer_dir=tmp_path / "tok")
    names = {p.name for p in (tmp_path / "hf").iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 7
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "toy"


def test_a_new_export_replaces_the_old_one_whole(export):
    (export / "leftover.txt").write_text("old")
    save_toy(Toy(seed=5), export)
    assert {p.name for p in export.iterdir()} == {"model.safetensors", "config.json", "generation_config.json"}
    assert [p.name for p in export.parent.iterdir()] == ["hf"]


def test_a_killed_save_leaves_no_trace_after_the_next(tmp_path):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial/model.safetensors").write_bytes(b"half")
    save_toy(Toy(), tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_refuses_to_replace_what_is_no_export(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="thesis: exists and is not a Hugging Face directory"):
        save_toy(Toy(), tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter1.tex").read_text() == "years of work"


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer_dir=.*: holds no tokenizer files such as tokenizer.json"):
        save_toy(Toy(), tmp_path / "hf", tokenizer_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def _limit_file_size(num_bytes: int) -> tuple[int, int]:
    """Writes past `num_bytes` fail with OSError, as on a full disk, at a point in the middle of a file."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    return old


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk(tmp_path, existing):
    path = tmp_path / "hf"
    if existing:
        save_toy(Toy(seed=6), path)
    old = _limit_file_size(900)
    try:
        with pytest.raises(CheckpointError, match=r"hf: not saved, .*(too large|No space)") as error:
            save_toy(Toy(seed=7), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert ("what was there before is intact" in str(error.value)) == existing
    assert [p.name for p in tmp_path.iterdir()] == (["hf"] if existing else [])
    if existing:
        loaded = Toy()
        load_hf(loaded, toy_map(), path)
        assert_equal(Toy(seed=6), loaded)


def test_missing_directory_and_missing_weights(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        load_hf(Toy(), toy_map(), tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither model.safetensors nor model.safetensors.index.json, only pyt"):
        load_hf(Toy(), toy_map(), tmp_path)


def edit(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_toy(Toy(), tmp_path / "single")
    return tmp_path / "single"


def test_missing_tensors_are_listed(single):
    edit(single, lambda t: [t.pop(name) for name in list(t) if name.startswith("experts")])
    expected = r"single: 6 of 8 tensors are missing: experts.0.gate_proj.weight, experts.0.up.* and 1 more"
    with pytest.raises(CheckpointError, match=expected):
        load_hf(Toy(), toy_map(), single)


def test_extra_tensors_are_listed_unless_not_strict(single):
    edit(single, lambda t: t.update({"model.layers.9.bias": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="1 tensors that this model does not have: model.layers.9.bias; is it an"):
        load_hf(Toy(), toy_map(), single)
    loaded = Toy(seed=8)
    load_hf(loaded, toy_map(), single, strict=False)
    assert_equal(Toy(), loaded)


def test_wrong_shape_and_dtype_are_named_and_nothing_is_loaded(single):
    edit(single, lambda t: t.update({"experts.2.up_proj.weight": torch.zeros(INTER, D + 1)}))
    module = Toy(seed=9)
    with pytest.raises(CheckpointError, match=r"experts.2.up_proj.weight has shape \[5, 7\].*\[5, 6\]"):
        load_hf(module, toy_map(), single)
    assert_equal(Toy(seed=9), module)
    edit(single, lambda t: t.update({"experts.2.up_proj.weight": torch.zeros(INTER, D, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="experts.2.up_proj.weight is stored as I8; only F32, BF16"):
        load_hf(module, toy_map(), single)


@pytest.mark.parametrize("kept", [0, 4, 100, -3])
def test_truncated_file_is_named(single, kept):
    file = single / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated or damaged safetensors file"):
        load_hf(Toy(), toy_map(), single)


def test_damaged_index(export):
    index = export / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="index.json: truncated or malformed JSON"):
        load_hf(Toy(), toy_map(), export)
    index.write_text('{"weights": {}}')
    with pytest.raises(CheckpointError, match="index.json: must hold an object `weight_map`"):
        load_hf(Toy(), toy_map(), export)


def test_index_names_what_is_not_there(export):
    index = export / "model.safetensors.index.json"
    good = index.read_text()
    values = json.loads(good)
    values["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="says that model.norm.weight is in model-00001-of-.*, but it is not"):
        load_hf(Toy(), toy_map(), export)
    index.write_text(good)
    last = sorted(export.glob("model-*"))[-1]
    last.unlink()
    with pytest.raises(CheckpointError, match=f"index.json: names the file {last.name}, which is not in"):
        load_hf(Toy(), toy_map(), export)
    values["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (export.parent / "elsewhere.safetensors").write_bytes(b"")
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="names the file ../elsewhere.safetensors, which is not in"):
        load_hf(Toy(), toy_map(), export)


def test_tied_head_may_be_on_disk_but_must_be_the_embedding(single):
    edit(single, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = Toy(seed=10)
    load_hf(loaded, toy_map(), single)
    assert_equal(Toy(), loaded)
    edit(single, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_hf(Toy(), toy_map(), single)


def test_name_map_must_cover_the_module(single):
    incomplete = toy_map()
    del incomplete["norm"]
    with pytest.raises(CheckpointError, match="name map does not describe this model: unknown to it norm"):
        load_hf(Toy(), incomplete, single)
    gap = toy_map() | {"norm": [Rows("model.norm.weight", 0, D - 1)]}
    with pytest.raises(CheckpointError, match="name map of norm: its parts have 5 rows, the parameter 6"):
        load_hf(Toy(), gap, single)


def _two_ranks(rank: int, root: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=2)
    module = fully_shard(Toy(seed=11), mesh=init_device_mesh("cpu", (2,)))
    assert module.w13.to_local().shape[0] < E * 2 * INTER
    load_hf(module, toy_map(), root / "source")
    for (name, sharded), whole in zip(module.named_parameters(), Toy(seed=12).parameters(), strict=True):
        assert torch.equal(sharded.full_tensor(), whole), name
    save_toy(module, root / "saved", max_shard_bytes=300)
    _limit_file_size(900)
    with pytest.raises(CheckpointError, match="saved: not saved, .*; what was there before is intact"):
        save_toy(module, root / "saved")
    leave_world()


def test_two_ranks_read_their_rows_and_both_hear_of_a_full_disk(tmp_path):
    save_toy(Toy(seed=12), tmp_path / "source")
    mp.spawn(_two_ranks, (tmp_path,), nprocs=2)
    loaded = Toy(seed=13)
    load_hf(loaded, toy_map(), tmp_path / "saved")
    assert_equal(Toy(seed=12), loaded)


MEMORY_PROBE = """
    import sys, torch
    from torch import nn
    from xtuner.checkpoint.hf import load_hf, save_hf
    from types import SimpleNamespace

    def memory(field):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(field)) * 1024

    def growth(action):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # forget the peak so far
        before = memory("VmRSS")
        action()
        return memory("VmHWM") - before

    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ParameterList([nn.Parameter(torch.ones(1024, 2048)) for _ in range(24)])  # 24 x 8 MiB

    model, path = Big(), sys.argv[1]
    rows = {n: [SimpleNamespace(hf_name=f"{n}.{i}", row_start=256 * i, num_rows=256) for i in range(4)]
            for n, _ in model.named_parameters()}
    save = lambda: save_hf(model, rows, path, config={}, max_shard_bytes=32 << 20)
    warm_up = nn.Module()
    warm_up.w = nn.Parameter(torch.ones(2))
    small = {"w": [SimpleNamespace(hf_name="w", row_start=0, num_rows=2)]}
    save_hf(warm_up, small, path + "-small", config={})
    load_hf(warm_up, small, path + "-small")
    print(growth(save), growth(lambda: load_hf(model, rows, path)))
"""


def test_memory_stays_below_one_shard_above_the_model(tmp_path):
    probe = [sys.executable, "-c", textwrap.dedent(MEMORY_PROBE), str(tmp_path / "hf")]
    done = subprocess.run(probe, check=True, capture_output=True, text=True, timeout=60)
    saving, loading = (int(number) / 2**20 for number in done.stdout.split())
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) == 6
    assert saving < 32, f"saving 192 MiB needed {saving:.0f} MiB more"
    assert loading < 32 + 8, f"loading 192 MiB needed {loading:.0f} MiB more"
