"""Runs whose memory is limited, as real processes: how they end, and that the advice lets them go on."""

import json
import re

import pytest
import torch

from tests.engine.tiny import ARCH, launch, losses, make_tokenizer
from xtuner.engine.out_of_memory import during, held_bytes, release
from xtuner.errors import OUT_OF_MEMORY_EXIT_CODE, OutOfMemoryError
from xtuner.run import main

TOKENS = 4096
ROOM = 420 << 20  # beside what a process has once everything is imported; the run needs 640 MiB, recomputing 300
CONFIG = """
import json, os, resource, sys
from pathlib import Path
import xtuner.engine.trainer
from xtuner.config import TrainConfig

status = Path("/proc/self/status").read_text()
held = 1024 * int(status.split("VmSize:")[1].split()[0])
if "--nproc" not in sys.argv:  # the launcher trains nothing
    resource.setrlimit(resource.RLIMIT_AS, (held + %d,) * 2)
config = TrainConfig.parse(json.loads(Path("values.json").read_text()))
"""


@pytest.fixture
def run_dir(tmp_path):
    """Of a run whose first document is half as long as the second; config.py in its parent limits the process."""
    make_tokenizer(tmp_path / "tokenizer")
    texts = ["gate " * n for n in (TOKENS // 10 + 1, TOKENS // 5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    moe = ARCH["moe"] | {"moe_intermediate_size": 64}
    sizes = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 24, "moe": moe}
    values = {
        "model": {"arch": ARCH | sizes | {"max_position_embeddings": TOKENS}},
        "data": {"train": ["train.jsonl"], "tokenizer": "tokenizer", "pack_max_length": TOKENS, "shuffle": False,
                 "cache_dir": "cache"},
        "run_dir": "run", "device": "cpu", "num_threads": 1, "steps": 2, "log": {"tensorboard": False},
        "checkpoint": {"every": 1, "export_hf": False},
    }  # fmt: skip
    (tmp_path / "values.json").write_text(json.dumps(values))
    (tmp_path / "config.py").write_text(CONFIG % ROOM)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_room_for_arenas(monkeypatch):
    """glibc reserves 64 MiB of addresses for each thread that allocates."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")


def test_a_run_that_does_not_fit_ends_with_advice_that_lets_it_go_on(run_dir):
    failed = launch("config.py", cwd=run_dir.parent)
    assert failed.returncode == OUT_OF_MEMORY_EXIT_CODE, failed.stderr
    message = r"error: out of memory in the (forward|backward) pass of step 2 on rank 0: (cannot allocate [\d.,]+ MiB"
    message += r"|an allocation failed); what was held is in run/out_of_memory/rank-0\.json\n"
    assert re.fullmatch(message, failed.stderr), failed.stderr
    snapshot = json.loads((run_dir / "out_of_memory" / "rank-0.json").read_text())
    assert snapshot["step"] == 2 and snapshot["phase"] in failed.stderr and snapshot["device"] == "cpu"
    held, weights = snapshot["bytes"], snapshot["bytes"]["parameters"]
    assert held["optimizer"] == pytest.approx(2 * weights, rel=1e-3)  # and step counts
    assert sum(held.values()) == snapshot["peak_bytes"] and held["activations"] > 0.5 * snapshot["peak_bytes"]
    assert "out of memory" in failed.stdout and "what would save how much" in failed.stdout
    advised = re.findall(r"│ (\S+=\S+) +│ ([\d.]+) +│", failed.stdout)
    (first, saved), *_ = advised
    assert first == "memory.checkpointing=full" and float(saved) == pytest.approx(0.33, abs=0.05), failed.stdout
    assert "memory.offload_optimizer=true" not in dict(advised)  # a processor's memory is the host's

    again = launch("config.py", first, "--resume", "auto", cwd=run_dir.parent)
    assert again.returncode == 0, again.stderr
    assert "resumed after step 1" in again.stdout
    assert len(losses(run_dir)) == 2


@pytest.mark.long
def test_the_launcher_advises_once_for_all_ranks(run_dir):
    failed = launch("config.py", "data.train=train.jsonl,train.jsonl", "global_batch_size=2", "--nproc", "2",
                    cwd=run_dir.parent)  # fmt: skip
    assert failed.returncode == OUT_OF_MEMORY_EXIT_CODE, failed.stderr
    assert re.search(r"error: out of memory in the \w+ pass of step \d on rank \d", failed.stderr), failed.stderr
    assert re.search(rf"error: rank \d ended with exit code {OUT_OF_MEMORY_EXIT_CODE}", failed.stderr)
    assert failed.stdout.count("what would save how much") == 1
    assert "memory.checkpointing=full" in failed.stdout


@pytest.mark.parametrize(
    ("raised", "detail"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), "cannot allocate 2.00 GiB"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 3145728 bytes. Error code 12"), "cannot allocate 3.00 MiB"),
        (MemoryError(), "an allocation failed"),
        (RuntimeError("std::bad_alloc"), "an allocation failed"),
    ],
)  # fmt: skip
def test_failed_allocations_are_recognised(raised, detail):
    with pytest.raises(OutOfMemoryError, match=f"^out of memory in the forward pass: {detail}$") as caught:
        with during("the forward pass"):
            raise raised
    assert caught.value.__cause__ is raised


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), during("the forward pass"):
        raise RuntimeError("shapes do not agree")


def test_a_real_allocation_of_torch_is_recognised_and_released():
    def step():
        kept = torch.ones(1000)
        held.append(torch.utils.weak.WeakTensorKeyDictionary({kept: 1}))
        torch.empty(1 << 60, dtype=torch.uint8)

    held = []
    with pytest.raises(OutOfMemoryError, match=r"cannot allocate 1,099,511,627,776.00 MiB") as caught:
        with during("the backward pass"):
            step()
    assert len(held[0]) == 1
    release(caught.value)
    assert len(held[0]) == 0


def test_what_is_held_is_counted_by_kind():
    weights = [torch.nn.Parameter(torch.ones(10, 10)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(weights)
    assert held_bytes(None, torch.device("cpu")) == {"parameters": 0, "gradients": 0, "optimizer": 0}
    weights[0].sum().backward()
    optimizer.step()
    assert held_bytes(optimizer, torch.device("cpu")) == {"parameters": 412, "gradients": 400, "optimizer": 804}
    assert held_bytes(optimizer, torch.device("cuda")) == {"parameters": 0, "gradients": 0, "optimizer": 0}


def test_a_file_that_is_no_snapshot_is_named(tmp_path, monkeypatch, capsys):
    command = ["advise", str(tmp_path / "rank-0.json")]
    monkeypatch.setattr("sys.argv", ["xtuner.run", *command])
    assert main(command) == 2
    assert "rank-0.json: not a readable snapshot of a run out of memory" in capsys.readouterr().err
