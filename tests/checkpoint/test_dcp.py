"""Atomicity and errors of sharded checkpoints, on one rank and real files."""

import resource
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from xtuner.checkpoint import dcp
from xtuner.checkpoint.dcp import CheckpointWriter, list_checkpoints, load_checkpoint, read_model, save_checkpoint
from xtuner.errors import CheckpointError

ARCH = {"hidden_size": 16}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 16, generator=generator)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save(root, step, model, optimizer, keep_last=9):
    return save_checkpoint(root, step, model, optimizer, {"step": step, "arch": ARCH}, keep_last)


def test_restored_run_continues_bit_for_bit(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 3)
    path = save(tmp_path, 3, model, optimizer)
    torch.manual_seed(5)
    expected = train(model, optimizer, 3, seed=2)
    other = build(seed=7)
    train(*other, 1)
    assert load_checkpoint(path, *other, ARCH)["step"] == 3
    assert train(*other, 3, seed=2) == expected


def test_random_state_comes_back(tmp_path):
    model, optimizer = build()
    path = save(tmp_path, 1, model, optimizer)
    expected = torch.rand(3)
    torch.manual_seed(99)
    load_checkpoint(path, model, optimizer, ARCH)
    assert torch.equal(torch.rand(3), expected)


def test_keeps_the_newest_and_cleans_up_after_interrupted_saves(tmp_path):
    model, optimizer = build()
    (tmp_path / "step-00000009.partial").mkdir()
    (tmp_path / "step-00000001.deleting").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer, keep_last=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_partial_save_is_not_a_checkpoint(tmp_path):
    (tmp_path / "step-00000005.partial").mkdir()
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"step-00000005\.partial: not a complete checkpoint"):
        load_checkpoint(tmp_path / "step-00000005.partial", *build(), ARCH)


def test_no_space_leaves_the_previous_checkpoint(tmp_path):
    """A real failure of write(2): a file-size limit, which ends in EFBIG as a full disk ends in ENOSPC."""
    model, optimizer = build()
    train(model, optimizer, 1)
    first = save(tmp_path, 1, model, optimizer)
    expected = train(model, optimizer, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000003: not saved, .*step-00000001 is intact"):
            save(tmp_path, 3, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    load_checkpoint(first, model, optimizer, ARCH)
    generator = torch.Generator().manual_seed(1)
    assert len(expected) == 2 and torch.isfinite(model(torch.randn(8, 16, generator=generator))).all()


def test_checkpoint_of_another_model_names_the_difference(tmp_path):
    model, optimizer = build()
    path = save(tmp_path, 1, model, optimizer)
    with pytest.raises(CheckpointError, match=r"checkpoint of another model: hidden_size=16 \(this run: 32\)"):
        load_checkpoint(path, model, optimizer, {"hidden_size": 32})


def test_damaged_checkpoint_is_named(tmp_path):
    model, optimizer = build()
    path = save(tmp_path, 1, model, optimizer)
    next(path.glob("*.distcp")).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="step-00000001: cannot be read"):
        load_checkpoint(path, model, optimizer, ARCH)


class SlowDisk:
    """torch's save, held back until `go`."""

    def __init__(self, monkeypatch):
        self.go, original = threading.Event(), dcp.dcp.save

        def save(*args, **kwargs):
            assert self.go.wait(timeout=60)
            return original(*args, **kwargs)

        monkeypatch.setattr(dcp.dcp, "save", save)


def test_training_goes_on_during_a_background_save(tmp_path, monkeypatch):
    """What is saved is the state at the time of the call, and nothing is a checkpoint before it is complete."""
    model, optimizer = build()
    train(model, optimizer, 3)
    writer, disk = CheckpointWriter(tmp_path, keep_last=2, background=True), SlowDisk(monkeypatch)
    path = writer.save(3, model, optimizer, {"step": 3, "arch": ARCH})
    expected = train(model, optimizer, 3, seed=2)
    assert list_checkpoints(tmp_path) == [] and (tmp_path / "step-00000003.partial").is_dir()
    disk.go.set()
    writer.wait()
    assert list_checkpoints(tmp_path) == [path]
    other = build(seed=7)
    assert load_checkpoint(path, *other, ARCH)["step"] == 3
    assert train(*other, 3, seed=2) == expected


def test_background_saves_follow_each_other(tmp_path):
    model, optimizer = build()
    writer = CheckpointWriter(tmp_path, keep_last=2, background=True)
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        writer.save(step, model, optimizer, {"step": step, "arch": ARCH})
    writer.wait()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


def test_a_failed_background_save_is_an_error_of_the_next_call(tmp_path, monkeypatch):
    model, optimizer = build()
    first = save(tmp_path, 1, model, optimizer)
    writer = CheckpointWriter(tmp_path, keep_last=2, background=True)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.dcp, "save", full)
    writer.save(2, model, optimizer, {"step": 2, "arch": ARCH})
    with pytest.raises(CheckpointError, match=r"step-00000002: not saved, .*No space left.*step-00000001 is intact"):
        writer.save(3, model, optimizer, {"step": 3, "arch": ARCH})
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


def test_a_model_is_read_in_portions(tmp_path):
    model, optimizer = build()
    path = save(tmp_path, 1, model, optimizer)
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    for max_bytes in (1, 5000, 1 << 20):
        read = dict(read_model(path, list(weights), max_bytes))
        assert list(read) == list(weights) and all(torch.equal(read[name], weights[name]) for name in weights)
    with pytest.raises(CheckpointError, match="holds no parameter 2.weight"):
        next(read_model(path, ["0.weight", "2.weight"], 1))
