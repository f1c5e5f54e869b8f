"""A run killed at any moment and resumed is, bit for bit, the run that was never stopped."""

import json
import random
import signal
import subprocess
import time

import psutil
import pytest
import torch

from tests.engine.tiny import command, environment, exported_weights, launch, losses, tiny_config, write_config

STEPS = 24
KILLS = 10


def start(config_file, *arguments, cwd):
    return subprocess.Popen(
        command(config_file, "--resume", "auto", *arguments), cwd=cwd, env=environment(), stdout=subprocess.DEVNULL
    )


def kill_tree(process):
    """SIGKILL to the launcher and all its workers at once, as a lost machine would."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=30)


def wait_for_step(process, run_dir, step):
    while process.poll() is None and (not (run_dir / "metrics.jsonl").exists() or len(losses_safely(run_dir)) < step):
        time.sleep(0.005)


def wait_for_save(process, run_dir, more_than):
    """Until a checkpoint is half written."""
    while process.poll() is None and not list((run_dir / "checkpoints").glob("*.partial")):
        time.sleep(0.0005)
    time.sleep(more_than)


def losses_safely(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [r for r in map(json.loads, lines) if r["kind"] == "train"]


def config_for(directory, name, **fields):
    fields = {"checkpoint": {"every": 3}, "steps": STEPS, "validation": {"every": 8}} | fields
    return tiny_config(directory, run_dir=str(directory / name), **fields)


def assert_same_run(run_dir, expected_dir):
    assert losses(run_dir) == losses(expected_dir)
    assert losses(run_dir, "validation") == losses(expected_dir, "validation")
    ours, theirs = exported_weights(run_dir), exported_weights(expected_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_ranks", "background"), [(1, False), (2, False), (2, True)])
def test_ten_kills(tmp_path, num_ranks, background):
    micro = {"micro_batch_size": 4 // num_ranks, "checkpoint": {"every": 3, "background": background}}
    arguments = ("--nproc", str(num_ranks))
    whole = write_config(tmp_path / "whole.json", config_for(tmp_path, "whole", **micro))
    assert launch(whole, *arguments, cwd=tmp_path).returncode == 0
    killed = write_config(tmp_path / "killed.json", config_for(tmp_path, "killed", **micro))
    run_dir, rng, caught_saving = tmp_path / "killed", random.Random(num_ranks), 0
    kills = KILLS // 2
    for attempt in range(kills):
        process = start(killed, *arguments, cwd=tmp_path)
        if attempt % 2:
            wait_for_save(process, run_dir, more_than=rng.random() * 0.01)
        else:
            wait_for_step(process, run_dir, rng.randint(2 + 4 * attempt, 6 + 4 * attempt))
        assert process.poll() is None, "the run ended before it could be killed"
        kill_tree(process)
        caught_saving += bool(list((run_dir / "checkpoints").glob("*.partial")))
    assert caught_saving >= 1, "no kill fell into a save"
    assert launch(killed, "--resume", "auto", *arguments, cwd=tmp_path).returncode == 0
    assert_same_run(run_dir, tmp_path / "whole")
    print(f"{num_ranks} rank(s): {kills} kills, {caught_saving} of them inside a save")


def test_stop_signal_saves_and_another_number_of_ranks_continues(tmp_path):
    whole = write_config(tmp_path / "whole.json", config_for(tmp_path, "whole"))
    assert launch(whole, cwd=tmp_path).returncode == 0
    config = config_for(tmp_path, "stopped", checkpoint={"every": 0})
    stopped = write_config(tmp_path / "stopped.json", config)
    run_dir = tmp_path / "stopped"
    process = start(stopped, cwd=tmp_path)
    wait_for_step(process, run_dir, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert 5 <= len(losses(run_dir)) < STEPS
    config["micro_batch_size"] = 2
    resumed = launch(
        write_config(tmp_path / "two.json", config), "--resume", "auto", "--nproc", "2", cwd=tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step" in resumed.stdout
    torch.testing.assert_close(
        torch.tensor(losses(run_dir)), torch.tensor(losses(tmp_path / "whole")), rtol=1e-5, atol=0
    )
    ours, theirs = exported_weights(run_dir), exported_weights(tmp_path / "whole")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_sigterm_to_the_launcher_reaches_its_workers(tmp_path):
    config = config_for(tmp_path, "two", checkpoint={"every": 0}, micro_batch_size=2, steps=2000)
    config_file = write_config(tmp_path / "two.json", config)
    process = start(config_file, "--nproc", "2", cwd=tmp_path)
    wait_for_step(process, tmp_path / "two", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 1


def test_a_used_run_dir_is_refused_without_resume(tmp_path):
    config_file = write_config(tmp_path / "run.json", config_for(tmp_path, "run", steps=2))
    assert launch(config_file, cwd=tmp_path).returncode == 0
    again = launch(config_file, cwd=tmp_path)
    assert again.returncode == 2
    assert "already holds a run; continue it with --resume auto, or choose another run_dir" in again.stderr
