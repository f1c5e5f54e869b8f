"""Where NaN or infinity came from: looked for only after a step was skipped, by running it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xtuner.batch import Batch
from xtuner.config import LossConfig
from xtuner.engine.train_step import accumulate_gradients
from xtuner.parallel import World

_LISTED = 3


def find_nonfinite(model: nn.Module, micro_batches: Sequence[Batch], loss_cfg: LossConfig, world: World) -> str:
    """Repeat forward and backward of a skipped step and name the first bad value of every kind. Collective.

    The kinds, in the order in which they explain each other: a weight; the output of a module (in the order of the
    forward pass, innermost first); the gradient that reaches a module's output (in the order of the backward pass);
    the gradient of a parameter, summed over ranks.
    """
    weights = [name for name, p in model.named_parameters() if not _finite(p)]
    with _watched_modules(model) as first_bad:
        accumulate_gradients(model, micro_batches, loss_cfg, world)
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    model.zero_grad(set_to_none=True)
    per_rank: list[Any] = [None] * world.size
    mine = (weights, first_bad.get("output"), first_bad.get("gradient"), gradients)
    if world.size > 1:
        dist.all_gather_object(per_rank, mine)
    else:
        per_rank = [mine]
    all_weights, outputs, output_gradients, all_gradients = zip(*per_rank, strict=True)
    found = [
        _names("weight of", all_weights),
        _first("output of", outputs),
        _first("gradient at the output of", output_gradients),
        _names("gradient of parameter", all_gradients),
    ]
    return "; ".join(text for text in found if text) or "nothing bad when the step was repeated"


@contextmanager
def _watched_modules(model: nn.Module) -> Iterator[dict[str, str]]:
    """While entered, the first module with a bad "output" and the first with a bad "gradient" there are noted."""
    first_bad: dict[str, str] = {}

    def note(kind: str, name: str, value: Tensor | None) -> None:
        if kind not in first_bad and value is not None and not _finite(value):  # an unused output's gradient is None
            first_bad[kind] = name

    def hook(name: str) -> Callable[..., None]:
        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _float_tensors(output):
                note("output", name, tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: note("gradient", name, gradient))

        return after_forward

    handles = [m.register_forward_hook(hook(name or "the model")) for name, m in model.named_modules()]
    try:
        yield first_bad
    finally:
        for handle in handles:
            handle.remove()


def _float_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _float_tensors(item)


def _finite(value: Tensor) -> bool:
    local = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(local.detach()).all())


def _first(what: str, name_per_rank: Sequence[str | None]) -> str:
    bad = [(rank, name) for rank, name in enumerate(name_per_rank) if name is not None]
    if not bad:
        return ""
    return f"first bad {what} {bad[0][1]}" + (f" on rank {bad[0][0]}" if len(name_per_rank) > 1 else "")


def _names(what: str, names_per_rank: Sequence[list[str]]) -> str:
    """The first parameter in the model's order (every rank may see it in its own shard alone), and how many more."""
    names = list(dict.fromkeys(name for names in names_per_rank for name in names))
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"bad {what} {', '.join(names[:_LISTED])}{more}"
