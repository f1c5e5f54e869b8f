"""Where a training step spends its time, by parts that mean the same for every contender."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

# An event belongs to the part of the nearest event around it (itself included) that one of these names.
BY_NAME = [
    ("attention", r"attention|fmha"),
    ("expert products", r"gemm_[mk]_grouped|_grouped_mm|fused_experts"),
    ("SwiGLU", r"swiglu|silu"),
    ("permute, unpermute", r"xtuner::(un)?permute|xtuner::route_map|GeneratedBackwardFor_xtuner_(un)?permute"),
    ("head, cross-entropy", r"cross_entropy|log_softmax|nll_loss|chunked_loss"),
    ("dense projections", r"linear_qkv"),
    ("norms", r"_RMSNorm|rms_norm"),  # with rotary where one operator does both
    ("rotary", r"_Rotate|xtuner::rotary|GeneratedBackwardFor_xtuner_rotary"),
    ("embedding", r"embedding"),
    ("AdamW, zero_grad", r"_fused_adamw|Optimizer\."),
]
# Class names of modules, ours and transformers'.
BY_MODULE = [
    ("norms", r"RMSNorm$"),
    ("rotary", r"RotaryEmbedding$"),
    ("router", r"Router$"),
    ("dense projections", r"^Linear$"),
    ("permute, unpermute", r"Experts$|^MoE$|SparseMoeBlock$"),  # what is left after the products and SwiGLU
    ("embedding", r"^Embedding$"),
]
_PREFIX = "part: "


def breakdown(model: nn.Module, step: Callable[[], None], functions: list[tuple[str, object, str]]) -> dict[str, float]:
    """Seconds of one call of `step` by part, as the calling thread sees them, largest first.

    Backward operators count to the part of their forward operator, which the profiler pairs by sequence number.

    Args:
        functions: (part, class or Python module, name of a function in it) for parts that are no module.
    """
    with _labelled(model, functions), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.events()
    forward: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not _in_backward(event):
            forward.setdefault(event.sequence_nr, _part_of(event))
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        part = _part_of(event)
        backward = _in_backward(event)
        if part == "other" and backward:
            part = forward.get(backward.sequence_nr, part)
        seconds[part] += event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def print_table(table: dict[str, dict[str, float]]) -> None:
    """`table`: contender -> part -> seconds."""
    first = next(iter(table.values()))
    parts = [*first, *(part for other in table.values() for part in other if part not in first)]
    print(f"{'part':24}" + "".join(f"{name:>28}" for name in table))
    for part in [*dict.fromkeys(parts), "sum"]:
        cells = []
        for seconds in table.values():
            whole = sum(seconds.values())
            value = whole if part == "sum" else seconds.get(part, 0.0)
            cells.append(f"{value * 1e3:>16.1f} ms {value / whole:>7.1%} ")
        print(f"{part:24}" + "".join(cells))


@contextmanager
def _labelled(model: nn.Module, functions: list[tuple[str, object, str]]):
    """Profiler scopes around the modules and functions that parts are made of."""
    handles, open_scopes, originals = [], [], []

    def enter(label: str):
        def hook(*_):
            open_scopes.append(record_function(_PREFIX + label))
            open_scopes[-1].__enter__()

        return hook

    def leave(*_):
        open_scopes.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        label = _first_match(BY_MODULE, type(module).__name__)
        if name in ("head", "lm_head"):
            label = "head, cross-entropy"
        if label:
            handles += [module.register_forward_pre_hook(enter(label)), module.register_forward_hook(leave)]
    for label, owner, name in functions:
        originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, record_function(_PREFIX + label)(getattr(owner, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, name, original in originals:
            setattr(owner, name, original)


def _first_match(rules: list[tuple[str, str]], name: str) -> str | None:
    return next((part for part, pattern in rules if re.search(pattern, name)), None)


def _part_of(event) -> str:
    while event is not None:
        if event.name.startswith(_PREFIX):
            return event.name.removeprefix(_PREFIX)
        part = _first_match(BY_NAME, event.name)
        if part:
            return part
        event = event.cpu_parent
    return "other"


def _in_backward(event):
    """The autograd node this event runs under, or None."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event
        event = event.cpu_parent
    return None


def dense_rate(repeats: int = 3, size: int = 1536) -> float:
    """Operations per second of torch.mm on square float32 matrices, the best of `repeats`."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
