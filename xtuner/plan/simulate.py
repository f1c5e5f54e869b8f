"""The engine's own training step, for one rank of many, on tensors without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner import ops
from xtuner.batch import Batch
from xtuner.config import ModelConfig, TrainConfig
from xtuner.engine import train_step as engine_step
from xtuner.errors import ConfigError
from xtuner.models import build_model
from xtuner.optim import build_adamw, clip_grad_norm, keep_state_on_host
from xtuner.parallel import AllToAllDispatcher, World, build_layout, parallelize
from xtuner.parallel.dispatch import AllToAllPlan
from xtuner.plan.device import Device
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
        ConfigError: a field whose memory and time are not simulated.
    """
    if cfg.fp8.enabled or cfg.optim.kind != "adamw":
        raise ConfigError(
            f"fp8.enabled={cfg.fp8.enabled} and optim.kind={cfg.optim.kind}: only float32 or bfloat16 with AdamW can "
            "be planned"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        world = World(0, 0, num_ranks, min(num_ranks, device.per_node), torch.device("cpu"))
        layout = build_layout(cfg.parallel, arch, world)
        with ExitStack() as stack:
            _enter_fake_world(stack, imbalance, fake)
            parallel = cfg.parallel.model_copy(update={"dispatcher": "all_to_all", "max_load": None})
            model = parallelize(build_model(arch), layout, parallel, world, cfg.memory)
            if not fake:
                model.init_weights(cfg.seed)
            optimizer = build_adamw(model, cfg.optim)
            if cfg.memory.offload_optimizer:
                keep_state_on_host(optimizer)
            batch = layout.slice(planned_batch(cfg.data.pack_max_length * cfg.micro_batch_size, document))
            return record_steps(cfg, model, optimizer, batch, world, device)
    finally:
        dist.destroy_process_group()


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

    def within(name: str, after: Callable[[FSDPParamGroup], None] | None = None):
        original = getattr(FSDPParamGroup, name)

        def run(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
            with tracker.making("communication"):
                result = original(group, *args, **kwargs)
            if after is not None:
                after(group)
            return result

        return mock.patch.object(FSDPParamGroup, name, run)

    def gradients(group: FSDPParamGroup) -> None:
        made = [p.sharded_param.grad for p in group.fsdp_params if hasattr(p, "sharded_param")]
        tracker.label(made, tracker.state_kind("gradients"))

    with within("unshard"), within("wait_for_unshard"), within("post_backward", gradients):
        yield


def _enter_fake_world(stack: ExitStack, imbalance: float, fake: bool) -> None:
    if fake:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_PlannedAnswers())
    else:  # no values travel over a fake process group, so that there is no norm to speak of
        stack.enter_context(mock.patch.object(engine_step, "clip_grad_norm", _clip_but_say_one))
    for name in ("__init__", "_concatenate", "_flatten", "__getitem__"):  # meshes are about real numbers
        stack.enter_context(mock.patch.object(DeviceMesh, name, _without_fake(getattr(DeviceMesh, name))))
    stack.enter_context(mock.patch.object(_fsdp_param, "_chunk_with_empty", _Chunks))
    stack.enter_context(mock.patch.object(AllToAllDispatcher, "_plan", _planned_loads(imbalance)))


def _clip_but_say_one(*args: Any) -> float:
    clip_grad_norm(*args)
    return 1.0


def _without_fake(method: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return method(*args, **kwargs)

    return call


class _Chunks:
    """torch.chunk that makes only what is asked for: FSDP2 cuts each parameter for all ranks and keeps one piece."""

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int):
        self.tensor, self.dim = tensor, dim
        self.size = -(-tensor.shape[dim] // num_chunks)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.size
        if start >= self.tensor.shape[self.dim]:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, start, min(self.size, self.tensor.shape[self.dim] - start))


class _PlannedAnswers(TorchDispatchMode):
    """What a host would read from tensors that have no data: every token is learned, every figure is one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not args or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def _planned_loads(imbalance: float) -> Callable:
    """In place of AllToAllDispatcher._plan, which reads loads: this rank sends evenly and gets `imbalance` the mean."""

    def plan(self: AllToAllDispatcher, topk_idx_TK: Tensor, num_experts: int) -> AllToAllPlan:
        counts_E, _, row_of, src = ops.route_map(topk_idx_TK, num_experts)
        counts_WE = counts_E.new_empty(self.world_size, num_experts)
        dist.all_gather(list(counts_WE), counts_E, group=self.process_group)
        rows = topk_idx_TK.numel()
        send = _spread(rows, self.world_size)
        receive = _spread(math.ceil(imbalance * rows), self.world_size)
        here = num_experts // self.world_size
        expert_R = torch.zeros(sum(receive), dtype=torch.int64, device=src.device)
        _, offsets, *row_map = ops.route_map(expert_R[:, None], here)
        return AllToAllPlan(send, receive, (row_of, src), tuple(row_map), offsets, None)

    return plan


def _spread(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


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
