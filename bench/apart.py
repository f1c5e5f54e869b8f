"""A contender of the whole-step benchmark in a process of its own, where no setting of another one reaches it."""

from __future__ import annotations

import argparse
import copy
import multiprocessing
from multiprocessing.connection import Connection

import torch
from torch import Tensor


class Apart:
    """Stands in for an e2e.Side that lives in another process: its steps, losses, times and model config."""

    def __init__(self, args: argparse.Namespace, implementations: list[str]):
        args = copy.copy(args)
        args.implementations = implementations
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, args), daemon=True)
        self._process.start()
        other.close()  # so that a dead process ends our recv()
        self.name, self.cfg, self.num_params = self._pipe.recv()
        self.losses: list[float] = []
        self.seconds: list[dict[str, float]] = []

    def step(self, ids: Tensor) -> None:
        self._pipe.send(ids.tolist())
        loss, seconds = self._pipe.recv()
        self.losses.append(loss)
        self.seconds.append(seconds)


def _serve(pipe: Connection, args: argparse.Namespace) -> None:
    import gc

    from e2e import make_sides, prepare_process

    prepare_process(args, keep_freed_memory=not args.implementations)
    side = make_sides(args, getattr(torch, args.dtype))[-1]
    gc.collect()
    gc.disable()
    pipe.send((side.name, side.cfg, side.num_params))
    try:
        while True:
            side.step(torch.tensor(pipe.recv()))
            pipe.send((side.losses[-1], side.seconds[-1]))
            gc.collect()
    except EOFError:  # the other end is done
        return
