"""Ranks that die, stop, or meet a NaN, as real processes."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.engine.test_kill import losses_safely
from tests.engine.tiny import command, environment, launch, losses, tiny_config, write_config
from xtuner.errors import HANG_EXIT_CODE


def start(config_file, *arguments, cwd):
    return subprocess.Popen(
        command(config_file, "--nproc", "2", *arguments), cwd=cwd, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def workers(launcher):
    """The ranks' processes by rank."""
    found = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child
    return found


def wait_for_step(launcher, run_dir, step):
    while launcher.poll() is None and (not (run_dir / "metrics.jsonl").exists() or len(losses_safely(run_dir)) < step):
        time.sleep(0.01)
    assert launcher.poll() is None, launcher.communicate()[1]


def config_for(directory, name, **fields):
    fields = {"steps": 12, "micro_batch_size": 2, "checkpoint": {"every": 3, "export_hf": False}} | fields
    return write_config(directory / f"{name}.json", tiny_config(directory, run_dir=str(directory / name), **fields))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


def test_a_killed_rank_is_named_and_the_launcher_goes_on_from_the_checkpoint(directory):
    """Without restarts the run ends within a minute; with one it ends with the losses of a run left alone."""
    assert launch(config_for(directory, "whole"), "--nproc", "2", cwd=directory).returncode == 0
    ended = start(config_for(directory, "ended", steps=5000), cwd=directory)
    wait_for_step(ended, directory / "ended", 4)
    workers(ended)[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    _, errors = ended.communicate(timeout=60)
    assert ended.returncode == 1 and time.monotonic() - killed_at < 60
    assert re.search(r"error: rank 1 \(pid \d+\) was killed by SIGKILL", errors), errors

    config = json.loads(config_for(directory, "restarted").read_text())
    restarted = start(write_config(directory / "restarted.json", config), "--max-restarts", "1", cwd=directory)
    wait_for_step(restarted, directory / "restarted", 4)
    workers(restarted)[1].send_signal(signal.SIGKILL)
    output, errors = restarted.communicate(timeout=60)
    assert restarted.returncode == 0, errors
    assert "resumed after step" in output
    assert losses(directory / "restarted") == losses(directory / "whole")


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_watchdog(directory, stopped):
    """Rank 0 is another case: it keeps the store that the heartbeats are in."""
    run_dir, other = directory / f"stopped{stopped}", 1 - stopped
    launcher = start(config_for(directory, run_dir.name, steps=5000, log={"hang_timeout_s": 3}), cwd=directory)
    wait_for_step(launcher, run_dir, 3)
    ranks = workers(launcher)
    ranks[stopped].send_signal(signal.SIGSTOP)
    try:
        psutil.wait_procs([ranks[other]], timeout=30)
        assert not ranks[other].is_running()
    finally:
        ranks[stopped].kill()  # the launcher would do so after half a minute
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == HANG_EXIT_CODE
    assert re.search(rf"error: the run hangs.*; missing: rank {stopped}", errors), errors
    if stopped:
        assert re.search(r"  rank 0: waiting in \w+, .*step \d+, xtuner/", errors), errors
        assert "  rank 1: no sign of life (stopped, killed or cut off); last seen" in errors


POISON = """
import sys, torch
from xtuner import run
from xtuner.engine import trainer
original, calls, handles = trainer.train_step, [], []

def poison(module, inputs, output):
    output[0].register_hook(lambda gradient: torch.full_like(gradient, float("nan")))

def train_step(model, *args):
    calls.append(1)
    for handle in handles:
        handle.remove()
    if len(calls) == 3 and torch.distributed.get_rank() == 1:
        handles.append(model.layers[1].moe.register_forward_hook(poison))
    return original(model, *args)

trainer.train_step = train_step
sys.exit(run.main(["train", *sys.argv[1:]]))
"""


def test_a_nan_in_one_ranks_gradient_skips_the_step_on_all(directory):
    config_file = config_for(directory, "nan", steps=6)
    (directory / "poison.py").write_text(POISON)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    result = subprocess.run(
        [*torchrun, "poison.py", str(config_file)], cwd=directory, env=environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (directory / "nan" / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in records if r["kind"] == "train"] == [False, False, True, False, False, False]
    assert "step 3: gradient norm is nan, step skipped (1 so far)" in result.stdout
    assert "first bad gradient at the output of layers.1.moe on rank 1; bad gradient of parameter " in result.stdout
    after = losses(directory / "nan")
    assert all(loss == loss for loss in after) and after[-1] < after[0]


SLEEPER = """
import sys, time, torch
from xtuner import run
from xtuner.engine import trainer
original = trainer._next_batches

def next_batches(state):
    time.sleep(0.3 if torch.distributed.get_rank() == 1 else 0)
    return original(state)

trainer._next_batches = next_batches
sys.exit(run.main(["train", *sys.argv[1:]]))
"""


def test_a_slow_rank_is_named(directory):
    config_file = config_for(directory, "slow", steps=8, log={"rank_report_every": 8, "profile_from": 2})
    (directory / "sleeper.py").write_text(SLEEPER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    result = subprocess.run(
        [*torchrun, "sleeper.py", str(config_file)], cwd=directory, env=environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(r"step 8: rank 1 is slow: 0\.\d+ s of its own per step, the median rank", result.stdout)
    trace = json.loads((directory / "slow" / "profile" / "rank-1.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "xtuner::route_map" in names
