"""An all-to-all that is under way while something else is computed, forward and backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Travel:
    """Rows to other ranks and rows from them, as many as `send` and `receive` say.

    Between `start` and `finish` nobody may look at the rows. In backward it is the other way round: the gradient of
    `finish` starts the way back, that of `start` waits for it, and what was computed in between is differentiated in
    between.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup | None):
        self.send, self.receive, self.group = send, receive, group
        self._work: dist.Work | None = None
        self._sent: Tensor | None = None  # is read until the work is done
        self._received: Tensor | None = None

    def start(self, rows: Tensor) -> Tensor:
        return _Start.apply(rows, self)

    def finish(self, rows: Tensor) -> Tensor:
        return _Finish.apply(rows, self)

    def issue(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self._sent, self._received = rows.contiguous(), rows.new_empty(sum(receive), rows.shape[1])
        self._work = dist.all_to_all_single(self._received, self._sent, receive, send, self.group, async_op=True)
        return self._received

    def wait(self) -> Tensor:
        self._work.wait()
        received, self._work, self._sent, self._received = self._received, None, None, None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        return travel.issue(rows, travel.send, travel.receive)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.travel.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        travel.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        travel = ctx.travel
        travel.issue(grad, travel.receive, travel.send)
        return grad, None  # only to have the shape that autograd expects between the two
