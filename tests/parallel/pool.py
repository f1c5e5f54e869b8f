"""Rank processes that live as long as the tests: a run on some of them starts in a moment."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


class RankPool:
    """`size` processes. Started on first use, and again after a run in which a rank failed or hung."""

    def __init__(self, size: int):
        self.size = size
        self._ranks: list[tuple[multiprocessing.Process, Connection]] = []

    def run(self, function: Callable, num_ranks: int, *args: Any, timeout: float = 120) -> list[Any]:
        """What function(*args) returns on each of `num_ranks` ranks, in an environment like the launcher's.

        Arguments and results are pickled. Raises AssertionError with the traceback of the first rank that failed.
        """
        if not self._ranks:
            self._start()
        pipes, results = [pipe for _, pipe in self._ranks[:num_ranks]], {}
        port = _free_port()
        for rank, pipe in enumerate(pipes):
            pipe.send((function, args, rank, num_ranks, port))
        deadline = time.monotonic() + timeout
        while len(results) < num_ranks:
            ready = wait([p for p in pipes if p not in results], max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                results[pipe], failure = pipe.recv()
                self._fail_if(failure, f"rank {pipes.index(pipe)} of {num_ranks}: {failure}")
            missing = [rank for rank, pipe in enumerate(pipes) if pipe not in results]
            self._fail_if(not ready, f"ranks {missing} of {num_ranks} did not finish in {timeout} s")
        return [results[pipe] for pipe in pipes]

    def close(self) -> None:
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _fail_if(self, condition: Any, message: str) -> None:
        if condition:
            self.close()  # the other ranks may wait for this one
            raise AssertionError(message)


def _serve(pipe: Connection) -> None:
    while True:
        function, args, rank, size, port = pipe.recv()
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="localhost", MASTER_PORT=str(port),
        )  # fmt: skip
        # They remember process groups of the run before by name.
        _gen_transform_infos.cache_clear()
        _clear_sharding_prop_cache()
        try:
            answer = function(*args), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
