"""The training loop. Read `train` top to bottom: build, resume, step until done, leave a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.batch import Batch
from xtuner.checkpoint.dcp import CheckpointWriter, list_checkpoints, load_checkpoint
from xtuner.checkpoint.hf import load_hf
from xtuner.config import ModelConfig, TrainConfig, save_config
from xtuner.data import Loader, PackedDataset, build_dataset
from xtuner.engine.metrics import MetricsWriter, read_metrics
from xtuner.engine.nonfinite import find_nonfinite
from xtuner.engine.out_of_memory import during, leave_snapshot, resident_bytes
from xtuner.engine.profile import ProfileWindow
from xtuner.engine.report import due, finish, report_ranks, report_step
from xtuner.engine.screen import Screen
from xtuner.engine.stop import StopRequest
from xtuner.engine.train_step import StepResult, train_step
from xtuner.engine.validate import validation_loss
from xtuner.engine.watchdog import Watchdog
from xtuner.errors import ConfigError, DataError, OutOfMemoryError
from xtuner.models import SIZES, build_model, config_from_hf, hf_map
from xtuner.nn.fp8 import use_fp8
from xtuner.ops import watch_faults
from xtuner.optim import build_optimizer, keep_state_on_host, learning_rate
from xtuner.parallel import Layout, World, build_layout, init_world, leave_world, materialize, parallelize

Prepare = Callable[[TrainConfig], TrainConfig]


@dataclass
class Run:
    """The state of a run: what a checkpoint holds, and what is needed to go on."""

    cfg: TrainConfig
    world: World
    layout: Layout
    arch: ModelConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    validation: PackedDataset | None
    writer: CheckpointWriter
    step: int = 0
    num_tokens: int = 0
    num_skipped: int = 0
    train_seconds: float = 0.0
    compared_at: tuple[int, float] = (0, 0.0)  # step and train_seconds when the ranks were last compared
    expert_counts: Tensor | None = None  # [L, E], choices that went to each expert of each MoE layer so far

    def save(self) -> None:
        counters = {"num_tokens": self.num_tokens, "num_skipped": self.num_skipped, "train_seconds": self.train_seconds}
        state = {"step": self.step, "counters": counters, "data": self.loader.state_dict(), "arch": _facts(self.arch)}
        if self.expert_counts is not None:
            state["expert_counts"] = self.expert_counts.tolist()
        self.writer.save(self.step, self.model, self.optimizer, state)

    def restore(self, path: Path) -> None:
        state = load_checkpoint(path, self.model, self.optimizer, _facts(self.arch))
        self.step = state["step"]
        self.loader.load_state_dict(state["data"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.compared_at = self.step, self.train_seconds
        if "expert_counts" in state:
            self.expert_counts = torch.tensor(state["expert_counts"], dtype=torch.float64)

    def count(self, result: StepResult, seconds: float) -> None:
        """Add one finished step."""
        self.step += 1
        self.num_tokens += result.num_tokens
        self.num_skipped += result.skipped
        self.train_seconds += seconds
        if result.expert_counts is not None:
            counts_LE = result.expert_counts.cpu()
            self.expert_counts = counts_LE if self.expert_counts is None else self.expert_counts + counts_LE


def train(cfg: TrainConfig, resume: bool = False, prepare: Prepare | None = None) -> dict[str, Any]:
    """Train to `cfg.steps`, or until SIGTERM/SIGINT asks to stop. Collective over the ranks of the launcher.

    Args:
        resume: continue from the newest checkpoint in `cfg.run_dir`, if there is one.
        prepare: called with the config before anything is read; returns the config to use (data made on the spot).

    Returns:
        The summary that is also written to `<run_dir>/summary.json`.

    Raises:
        ConfigError, DataError, CheckpointError: about the user's input, before the first step where possible.
        OutOfMemoryError: the run does not fit; a snapshot of what was held is in `cfg.run_dir`.
    """
    world = init_world(cfg.device, cfg.num_threads)
    resident, run = resident_bytes(world.device), None
    try:
        cfg = _on_local_main_first(world, lambda: prepare(cfg)) if prepare else cfg
        _open_run_dir(cfg, resume, world)
        with during("the building of the model"):
            run = _build(cfg, world)
        checkpoint = list_checkpoints(run.writer.root)[-1:] if resume else []
        if checkpoint:
            run.restore(checkpoint[0])
        return _loop(run)
    except OutOfMemoryError as e:
        step, optimizer = (run.step + 1, run.optimizer) if run is not None else (None, None)
        leave_snapshot(e, cfg, world, step, optimizer, resident)
        raise
    finally:
        leave_world()


def _loop(run: Run) -> dict[str, Any]:
    cfg, world = run.cfg, run.world
    screen = Screen(cfg.steps, run.step, enabled=world.is_main)
    metrics = MetricsWriter(cfg.run_dir, cfg.log.tensorboard, run.step) if world.is_main else None
    if run.step:
        screen.note(f"resumed after step {run.step}")
    held_out, stopped = _last_validation(cfg.run_dir), False
    watchdog, profile = Watchdog(world, cfg.log.hang_timeout_s), ProfileWindow(cfg.log, cfg.run_dir, world)
    with StopRequest() as stop, screen, watchdog, profile:
        while run.step < cfg.steps and not stopped:
            watchdog.progress(f"step {run.step + 1}")
            profile.before_step(run.step + 1)
            started = time.perf_counter()
            lr = learning_rate(run.step, cfg.steps, cfg.optim.lr, cfg.schedule)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            batches = _next_batches(run)
            result = train_step(run.model, run.optimizer, batches, cfg.loss, cfg.optim.max_grad_norm, world)
            seconds = time.perf_counter() - started
            run.count(result, seconds)
            last = run.step == cfg.steps
            report_step(run, screen, metrics, result, lr, seconds)
            if result.skipped:
                screen.note(f"  {find_nonfinite(run.model, batches, cfg.loss, world)}")
            if due(run.step, cfg.log.rank_report_every):
                report_ranks(run, screen, metrics, watchdog.take_waiting_share())
            if run.validation is not None and (last or due(run.step, cfg.validation.every)):
                watchdog.progress(f"validation after step {run.step}")
                held_out = validation_loss(run.model, run.validation, world, run.layout, cfg.validation.max_packs)
                screen.note(f"step {run.step}: held-out loss {held_out:.4f} nats/token")
                if metrics:
                    metrics.write("validation", run.step, {"loss": held_out})
            stopped = world.any(stop.requested) and not last
            if stopped or (last and cfg.checkpoint.final) or due(run.step, cfg.checkpoint.every):
                watchdog.progress(f"checkpoint after step {run.step}")
                run.save()
        watchdog.progress(f"checkpoint after step {run.step}")
        run.writer.wait()
    if metrics:
        metrics.close()
    if stopped:
        screen.note(f"stopped after step {run.step}; the run continues with --resume auto")
        return {"step": run.step, "stopped": True}
    return finish(run, screen, held_out)


def _build(cfg: TrainConfig, world: World) -> Run:
    arch, source = resolve_model(cfg)
    layout = build_layout(cfg.parallel, arch, world)
    tokenizer = cfg.data.tokenizer or source
    if tokenizer is None:
        raise ConfigError("data.tokenizer: required, since model.path does not give one")
    dataset = _on_local_main_first(world, lambda: build_dataset(cfg.data.train, cfg.data, tokenizer))
    validation = None
    if cfg.data.validation:
        validation = _on_local_main_first(world, lambda: build_dataset(cfg.data.validation, cfg.data, tokenizer))
    loader = Loader(
        dataset,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.micro_batch_size,
        rank=layout.data_rank,
        world_size=layout.data_size,
        seed=cfg.seed,
        shuffle=cfg.data.shuffle,
    )
    if world.device.type == "cuda":
        watch_faults(world.device)
    # Built without memory, laid out, and only then filled: no rank ever holds the whole model.
    model = build_model(arch, device="meta")
    if cfg.fp8.enabled:
        use_fp8(model.layers)
    model = parallelize(model, layout, cfg.parallel, world, cfg.memory)
    materialize(model, world, cfg.memory)
    model.init_weights(cfg.seed)
    if source is not None:
        load_hf(model, hf_map(arch), source)
    optimizer = build_optimizer(model, cfg.optim)
    if cfg.memory.offload_optimizer:
        keep_state_on_host(optimizer)
    writer = CheckpointWriter(cfg.run_dir / "checkpoints", cfg.checkpoint.keep_last, cfg.checkpoint.background)
    return Run(cfg, world, layout, arch, model, optimizer, loader, validation, writer)


def resolve_model(cfg: TrainConfig) -> tuple[ModelConfig, Path | None]:
    """The architecture, and the directory its weights come from (None: fresh ones)."""
    arch, source = _chosen_model(cfg)
    if cfg.loss.bias_update_rate and arch.moe is None:
        raise ConfigError(f"loss.bias_update_rate={cfg.loss.bias_update_rate}: a dense model has no experts to balance")
    if cfg.loss.bias_update_rate:
        arch = arch.model_copy(update={"moe": arch.moe.model_copy(update={"choice_bias": True})})
    return arch, source


def _chosen_model(cfg: TrainConfig) -> tuple[ModelConfig, Path | None]:
    if cfg.model.path is not None:
        return config_from_hf(cfg.model.path), cfg.model.path
    if cfg.model.arch is not None:
        return cfg.model.arch, None
    if cfg.model.name not in SIZES:
        raise ConfigError(f"model.name={cfg.model.name} is no built-in size; there are {', '.join(sorted(SIZES))}")
    return SIZES[cfg.model.name], None


def refuse_used_run_dir(run_dir: Path) -> None:
    if (run_dir / "metrics.jsonl").exists():
        raise ConfigError(
            f"run_dir={run_dir} already holds a run; continue it with --resume auto, or choose another run_dir"
        )


def _open_run_dir(cfg: TrainConfig, resume: bool, world: World) -> None:
    """Refuse to mix two runs in one directory, then leave the resolved config there."""
    if not resume:
        refuse_used_run_dir(cfg.run_dir)
    world.barrier()  # all ranks have looked before rank 0 writes
    if world.is_main:
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(cfg, cfg.run_dir / "config.json")


def _next_batches(run: Run) -> list[Batch]:
    """This rank's micro-batches of the next step. Raises DataError if the tokenizer is not this model's."""
    batches = run.loader.next_step()
    largest = max(int(batch.input_ids.max()) for batch in batches)
    if largest >= run.arch.vocab_size:
        raise DataError(
            f"token id {largest} is outside the model's vocab_size={run.arch.vocab_size}: "
            f"data.tokenizer={run.cfg.data.tokenizer or run.cfg.model.path} does not belong to this model"
        )
    return [run.layout.slice(batch).to(run.world.device) for batch in batches]


def _on_local_main_first(world: World, action: Callable[[], Any]) -> Any:
    """Let one process of each node do shared work (a cache, a download) before the others find it done."""
    if world.local_rank == 0:
        outcome = action()
    world.barrier()
    return outcome if world.local_rank == 0 else action()


def _last_validation(run_dir: Path) -> float | None:
    losses = [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "validation"]
    return losses[-1] if losses else None


def _facts(arch: ModelConfig) -> dict[str, Any]:
    return arch.model_dump(mode="json")
