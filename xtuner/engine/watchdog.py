"""Notices a run that hangs, names the ranks and the collective it hangs on, and ends the process.

Every rank leaves heartbeats in torch's store from a thread of its own, so they go on while a collective waits and stop
when the process is stopped, killed or cut off. A rank looks at its own progress and at its neighbour's heartbeats;
only when something is wrong does anybody read those of all ranks. What a rank is doing is read off the Python stack
of its main thread, which costs the collectives nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from xtuner.errors import HANG_EXIT_CODE
from xtuner.parallel import World

SAMPLE_S = 0.05  # between looks at the main thread's stack
SILENCE_S = 60.0  # a rank without heartbeats for this long is gone, whatever `timeout_s` allows the work to take
BEATS_PER_TIMEOUT = 6
_PACKAGE = str(Path(__file__).resolve().parents[1])
_TORCH_DISTRIBUTED = str(Path(dist.__file__).parent)


class Watchdog:
    """While entered, watches all ranks; with one rank it does nothing.

    Args:
        timeout_s: without `progress` for this long the run hangs; 0: never.
    """

    def __init__(self, world: World, timeout_s: float):
        self.world, self.timeout_s = world, timeout_s
        self._task, self._progress_at = "start", time.monotonic()
        self._samples = self._waiting_samples = 0
        self._limit = min(timeout_s or SILENCE_S, SILENCE_S)
        self._period = self._limit / BEATS_PER_TIMEOUT
        self._answered_at = time.monotonic()  # when the store last did
        self._ended = threading.Event()
        # The store may keep a call for hours; then the other thread must still see and act.
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._look, self._beat)]

    def __enter__(self) -> Watchdog:
        self._main = threading.get_ident()
        self.progress("start")
        if self.world.size > 1:
            # A client of its own: the store's other calls may block.
            self._beats = Heartbeats(_get_default_store().clone(), self.world)
            self._write(idle=0)
            self.world.barrier()  # from here on every rank has an entry
            self._answered_at = time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.world.size > 1:
            self._ended.set()
            for thread in self._threads:
                thread.join(self._limit)
            if error is None:
                self._beats.leave()
                self.world.barrier()  # rank 0 may keep the store, and must not go while others read it

    def progress(self, task: str) -> None:
        """The main thread goes on, with `task` (such as "step 12")."""
        self._task, self._progress_at = task, time.monotonic()

    def take_waiting_share(self) -> float:
        """Part of the time since the last call that the main thread spent in collectives, in [0, 1]."""
        share = self._waiting_samples / max(1, self._samples)
        self._samples = self._waiting_samples = 0
        return share

    def _look(self) -> None:
        looked_at = time.monotonic()
        while not self._ended.wait(SAMPLE_S):
            self._samples += 1
            self._waiting_samples += where(self._main)["collective"] is not None
            now = time.monotonic()
            if now - looked_at > self._limit / 2:  # this very process was stopped: it cannot blame anybody
                self._progress_at = self._answered_at = now
                self._beats.forgive()
            looked_at = now
            if self.timeout_s and now - self._answered_at > self._limit + self._period:
                _end("the run hangs; missing: rank 0, or the launcher beside it: the store there does not answer")

    def _beat(self) -> None:
        try:
            while not self._ended.wait(self._period):
                idle = time.monotonic() - self._progress_at
                self._write(idle)
                silent = self._beats.neighbour_silence()
                self._answered_at = time.monotonic()
                if self.timeout_s and (idle > self.timeout_s or silent > self._limit):
                    self._report(idle)
        except dist.DistError as e:
            if not self._ended.wait(2.0):  # else an error of our own ends us
                _end(f"the run breaks off; missing: rank 0, or the launcher beside it: the store there is gone ({e})")

    def _report(self, idle: float) -> None:
        """Of all ranks that notice, the first tells; the others go on beating meanwhile, then leave too."""
        first = self._beats.claim_report()
        before = self._beats.read_all() if first else {}
        for _ in range(3):
            time.sleep(self._period)
            self._write(idle)
        if first:
            _end(describe_hang(before, self._beats.read_all(), self.world.size))
        time.sleep(3 * self._period)  # the launcher ends us earlier
        _end("another rank has told why")

    def _write(self, idle: float) -> None:
        self._beats.write({"task": self._task, "idle_s": round(idle), **where(self._main)})


class Heartbeats:
    """One entry per rank in the store: a counter and what the rank is doing."""

    def __init__(self, store: dist.Store, world: World):
        self._store, self._rank, self._size = store, world.rank, world.size
        self._count = 0
        self.forgive()

    def write(self, values: dict[str, Any]) -> None:
        self._count += 1
        self._store.set(_key(self._rank), json.dumps({"count": self._count, **values}))

    def leave(self) -> None:
        """This rank is done, and its silence from now on means nothing."""
        self._store.set(_key(self._rank), json.dumps({"left": True}))

    def neighbour_silence(self) -> float:
        """Seconds since the next rank's heartbeat last changed; 0 if it is done."""
        beat = self._read((self._rank + 1) % self._size)
        count, since = self._neighbour
        if beat.get("count") != count:
            self.forgive(beat.get("count"))
        return 0.0 if beat.get("left") else time.monotonic() - self._neighbour[1]

    def forgive(self, count: int | None = None) -> None:
        """Measure the neighbour's silence from now on."""
        self._neighbour = (count, time.monotonic())

    def claim_report(self) -> bool:
        return self._store.add("xtuner/hang", 1) == 1

    def read_all(self) -> dict[int, dict[str, Any]]:
        return {rank: self._read(rank) for rank in range(self._size)}

    def _read(self, rank: int) -> dict[str, Any]:
        return json.loads(self._store.get(_key(rank)))


def where(thread: int) -> dict[str, str | None]:
    """The collective that `thread` is in, if any, and the innermost line of this package."""
    frame = sys._current_frames().get(thread)
    collective = line = None
    while frame is not None and line is None:
        file = frame.f_code.co_filename
        if collective is None and _is_collective(frame):
            collective = frame.f_code.co_name
        if file.startswith(_PACKAGE):
            line = f"{os.path.relpath(file, os.path.dirname(_PACKAGE))}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return {"collective": collective, "line": line}


def _is_collective(frame: FrameType) -> bool:
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    if file.startswith(os.path.join(_PACKAGE, "ops", "ep_")):
        return True
    return file.startswith(_TORCH_DISTRIBUTED) and not file.endswith("c10d_logger.py") and not name.startswith("_")


def describe_hang(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], num_ranks: int) -> str:
    """Who is missing, and where the others wait, from two looks at all heartbeats, several beats apart."""
    here = [r for r in range(num_ranks) if not after[r].get("left")]
    silent = [r for r in here if after[r] == before[r]]
    places: dict[str, list[int]] = defaultdict(list)
    for rank in here:
        beat = after[rank]
        doing = f"waiting in {beat['collective']}" if beat["collective"] else "in no collective"
        places[f"{doing}, {beat['task']}, {beat['line']}"].append(rank)
    most = max(places.values(), key=lambda ranks: len(set(ranks) - set(silent)), default=[])
    others = [r for ranks in places.values() if ranks is not most for r in ranks]
    missing = silent or others
    idle = max((after[r]["idle_s"] for r in here), default=0)
    lines = [f"the run hangs: no progress for {idle} s" + (f"; missing: {_ranks(missing)}" if missing else "")]
    for place, ranks in places.items():
        lines += [f"  {_ranks([r for r in ranks if r not in silent])}: {place}"] if set(ranks) - set(silent) else []
    for rank in silent:
        last = next(place for place, ranks in places.items() if rank in ranks)
        lines.append(f"  rank {rank}: no sign of life (stopped, killed or cut off); last seen {last}")
    return "\n".join(lines)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(r) for r in ranks[:16]) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return ("rank " if len(ranks) == 1 else "ranks ") + shown


def _key(rank: int) -> str:
    return f"xtuner/heartbeat/{rank}"


def _end(message: str) -> None:
    """The main thread cannot be interrupted inside a collective, so the process ends here."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(HANG_EXIT_CODE)
