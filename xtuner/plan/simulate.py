"""The engine's own training step, for one rank of many, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from xtuner.batch import Batch
from xtuner.config import ModelConfig, TrainConfig
from xtuner.engine import train_step as engine_step
from xtuner.errors import ConfigError
from xtuner.models import build_model
from xtuner.nn.fp8 import use_fp8
from xtuner.optim import build_optimizer, keep_state_on_host
from xtuner.parallel import Layout, World, build_layout, parallelize
from xtuner.parallel.fp8 import gather_in_fp8
from xtuner.plan.device import Device
from xtuner.plan.fake_world import fake_tensors, fake_world
from xtuner.plan.internals import FSDP_STEPS, FSDPParamGroup
from xtuner.plan.roofline import Clock
from xtuner.plan.tracker import MemoryTracker

STEPS = 2  # in the first there is no optimizer state yet


@dataclass(frozen=True)
class Simulation:
    """Of the last step: memory by kind, and time by phase."""

    tracker: MemoryTracker
    clock: Clock


def simulate(
    cfg: TrainConfig,
    arch: ModelConfig,
    num_ranks: int,
    device: Device,
    document: int | None = None,
    imbalance: float = 1.0,
    fake: bool = True,
) -> Simulation:
    """Run two steps of rank 0 of `num_ranks`, with one micro-batch each.

    Args:
        document: tokens of each document; None: the micro-batch is one document.
        imbalance: rows that come to this rank's experts over the mean.
        fake: tensors without data; with data (for small models) tests compare both.

    Raises:
        ConfigError: float8 on a device without it, or of widths that it cannot have.
    """
    if cfg.fp8.enabled and not device.fp8:
        raise ConfigError(f"fp8.enabled=true: {device.name} does not multiply in float8")
    with fake_world(num_ranks, device.per_node) as world:
        layout = build_layout(cfg.parallel, arch, world)
        with fake_tensors(imbalance, fake):
            model = build_rank(cfg, arch, layout, world)
            if not fake:
                model.init_weights(cfg.seed)
            optimizer = build_optimizer(model, cfg.optim)
            if cfg.memory.offload_optimizer:
                keep_state_on_host(optimizer)
            batch = layout.slice(planned_batch(cfg.data.pack_max_length * cfg.micro_batch_size, document))
            return record_steps(cfg, model, optimizer, batch, world, device)


def build_rank(cfg: TrainConfig, arch: ModelConfig, layout: Layout, world: World) -> nn.Module:
    """This rank's part of the model, within `fake_tensors`."""
    # All rows of a rank's experts at once: what loads come is said by `imbalance`, not read from the tokens.
    parallel = cfg.parallel.model_copy(update={"dispatcher": "all_to_all", "max_load": None})
    model = build_model(arch)
    if cfg.fp8.enabled:
        use_fp8(model.layers)
    model = parallelize(model, layout, parallel, world, cfg.memory)
    if cfg.fp8.enabled:
        gather_in_fp8(model)
    return model


def record_steps(
    cfg: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, world: World, device: Device
) -> Simulation:
    """Two steps on this rank's `batch`, watched. Also of use on real ranks, to hold a plan against."""
    tracker = _Recorder(Clock(device), on_host=cfg.memory.offload_parameters)
    tracker.label(model.parameters(), tracker.state_kind("parameters"))
    tracker.label(model.buffers(), "parameters")
    optimizer.step = _during(tracker, "update", tracker.state_kind("optimizer"), optimizer.step)
    model.register_forward_pre_hook(lambda *_: tracker.enter("forward"))
    model.register_forward_hook(lambda *_: tracker.enter("backward"))
    with tracker, _labelled(tracker):
        for _ in range(STEPS):
            tracker.clock = Clock(device)
            tracker.enter("forward")
            tracker.windows.clear()
            engine_step.train_step(model, optimizer, [batch], cfg.loss, cfg.optim.max_grad_norm, world)
            tracker.enter("between")
    return Simulation(tracker, tracker.clock)


class _Recorder(MemoryTracker):
    """A tracker that also keeps time."""

    def __init__(self, clock: Clock, on_host: bool):
        super().__init__()
        self.clock, self.on_host = clock, on_host

    def state_kind(self, kind: str) -> str:
        """What sharded weights, gradients and optimizer state count as."""
        return "host" if self.on_host else kind

    def observe(self, func: torch._ops.OpOverload, args: Any, result: Any) -> None:
        self.clock.run(self.phase_name, func, args, result)


def _during(tracker: _Recorder, phase: str, kind: str, step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with tracker.phase(phase, kind):
            step()

    return run


@contextmanager
def _labelled(tracker: _Recorder) -> Iterator[None]:
    """Tell what FSDP2 makes: buffers of collectives, and gradients."""

    def within(name: str) -> Any:
        original = getattr(FSDPParamGroup, name)

        def run(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
            with tracker.making("communication"):
                result = original(group, *args, **kwargs)
            if name == "post_backward":
                made = [p.sharded_param.grad for p in group.fsdp_params if hasattr(p, "sharded_param")]
                tracker.label(made, tracker.state_kind("gradients"))
            if name != "unshard":  # which may come early, to prefetch
                tracker.mark()
            return result

        return mock.patch.object(FSDPParamGroup, name, run)

    with ExitStack() as stack:
        for name in FSDP_STEPS:
            stack.enter_context(within(name))
        yield


def planned_batch(tokens: int, document: int | None) -> Batch:
    document = min(document or tokens, tokens)
    bounds = [*range(0, tokens, document), tokens]
    positions = [torch.arange(end - start) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    return Batch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        labels=torch.zeros(tokens, dtype=torch.int64),
        loss_weights=torch.ones(tokens),
        positions=torch.cat(positions)[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=document,
    )
