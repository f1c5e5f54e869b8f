"""What the watchdog sees and says; tests/engine/test_faults.py stops real ranks."""

import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.engine.test_train_step import ALONE
from xtuner.engine import watchdog
from xtuner.engine.watchdog import Heartbeats, Watchdog, describe_hang
from xtuner.parallel import World


def beat(count, collective="all_reduce", line="xtuner/a.py:1 (f)", task="step 7", idle=40):
    return {"count": count, "collective": collective, "line": line, "task": task, "idle_s": idle}


def test_a_silent_rank_is_missing():
    before = {0: beat(3), 1: beat(9), 2: beat(5)}
    text = describe_hang(before, {0: beat(6), 1: beat(9), 2: beat(8)}, 3)
    assert text.splitlines() == [
        "the run hangs: no progress for 40 s; missing: rank 1",
        "  ranks 0, 2: waiting in all_reduce, step 7, xtuner/a.py:1 (f)",
        "  rank 1: no sign of life (stopped, killed or cut off); last seen waiting in all_reduce, step 7, "
        "xtuner/a.py:1 (f)",
    ]


def test_a_rank_that_does_something_else_is_missing():
    before = {r: beat(1) for r in range(4)}
    after = {r: beat(4) for r in range(4)} | {2: beat(4, None, "xtuner/data/loader.py:9 (next_step)", "step 6")}
    lines = describe_hang(before, after, 4).splitlines()
    assert lines[0] == "the run hangs: no progress for 40 s; missing: rank 2"
    assert "  rank 2: in no collective, step 6, xtuner/data/loader.py:9 (next_step)" in lines


def test_ranks_that_are_done_are_left_out():
    text = describe_hang({0: beat(1), 1: {"left": True}}, {0: beat(2), 1: {"left": True}}, 2)
    assert "rank 1" not in text


def test_where_names_the_innermost_public_function_of_the_library(monkeypatch):
    entered, go_on = threading.Event(), threading.Event()

    def all_gather():
        _wait()

    def _wait():
        entered.set()
        go_on.wait()

    thread = threading.Thread(target=all_gather)
    thread.start()
    entered.wait()
    try:
        assert watchdog.where(thread.ident) == {"collective": None, "line": None}
        monkeypatch.setattr(watchdog, "_TORCH_DISTRIBUTED", str(Path(__file__).parent))
        assert watchdog.where(thread.ident) == {"collective": "all_gather", "line": None}
    finally:
        go_on.set()
        thread.join()


def test_neighbour_silence_and_leaving():
    store = dist.HashStore()
    two = [Heartbeats(store, World(r, r, 2, 2, ALONE.device)) for r in range(2)]
    two[1].write({"task": "x"})
    assert two[0].neighbour_silence() < 0.5
    two[0]._neighbour = (1, two[0]._neighbour[1] - 100)
    assert two[0].neighbour_silence() > 99
    two[1].write({"task": "x"})
    assert two[0].neighbour_silence() < 0.5
    two[1].leave()
    two[0]._neighbour = (None, -1e9)
    assert two[0].neighbour_silence() == 0
    assert two[0].claim_report() and not two[1].claim_report()


@pytest.mark.parametrize("timeout_s", [0, 900])
def test_alone_there_is_nothing_to_watch(timeout_s):
    with Watchdog(ALONE, timeout_s) as alone:
        alone.progress("step 1")
        assert alone.take_waiting_share() == 0
