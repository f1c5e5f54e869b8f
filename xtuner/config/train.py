"""The whole of a training run in one tree."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from xtuner.config.base import ConfigBase
from xtuner.config.data import DataConfig
from xtuner.config.memory import MemoryConfig
from xtuner.config.model import ModelConfig


class ModelSource(ConfigBase):
    """Exactly one of the three says which model is trained."""

    name: str | None = Field(None, description="a built-in size, freshly initialised (qwen3-30b-a3b, …)")
    path: Path | None = Field(None, description="a Hugging Face directory: its config.json and weights")
    arch: ModelConfig | None = Field(None, description="an explicit architecture, freshly initialised")

    @model_validator(mode="after")
    def _check(self):
        given = [f for f in ("name", "path", "arch") if getattr(self, f) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of name, path, arch; got {' and '.join(given) or 'none'}")
        return self


class LossConfig(ConfigBase):
    aux_loss: Literal["layer", "hf", "none"] = Field(
        "layer", description="load balancing: per layer; as transformers defines it (all layers pooled); none"
    )
    aux_loss_coef: float = Field(0.001, ge=0, description="weight of the load-balancing loss")
    z_loss_coef: float = Field(0.0, ge=0, description="weight of the router z-loss")
    bias_update_rate: float = Field(
        0.0, ge=0, description="balance by a bias per expert on the choice, moved this much per step; 0: no such bias"
    )


class OptimConfig(ConfigBase):
    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonal updates of the matrices inside the layers, AdamW for everything else"
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW moment decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; norms and biases have none")
    max_grad_norm: float = Field(1.0, gt=0, description="the global gradient is scaled down to this norm")


class ScheduleConfig(ConfigBase):
    kind: Literal["constant", "linear", "cosine", "wsd"] = Field("cosine", description="shape after warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear rise from 0 to optim.lr, in steps")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate as a part of optim.lr")
    decay_steps: int = Field(0, ge=0, description="wsd: length of the final linear decay, in steps")


class ParallelConfig(ConfigBase):
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of gathered weights and activations; master weights are always float32"
    )
    reshard_after_forward: bool = Field(True, description="free gathered weights between forward and backward")
    shard_size: int | None = Field(
        None, ge=1, description="ranks that weights are sharded over; fewer than all: copies of the whole (HSDP)"
    )
    ep_size: int = Field(1, ge=1, description="ranks that experts are split over; tokens travel among them")
    sp_size: int = Field(1, ge=1, description="ranks that share one sequence (Ulysses)")
    intra_layer_micro_batches: Literal[1, 2] = Field(
        1, description="2: halves of a batch take turns in each layer, one computing while the other's tokens travel"
    )
    dispatcher: Literal["auto", "all_to_all", "fused"] = Field(
        "auto", description="how tokens travel to experts; auto: fused (shared memory) on CPUs of one machine"
    )
    dispatch_mode: Literal["exact", "static"] = Field(
        "exact", description="room for the rows of a rank's experts: as many as come, or always capacity_factor's"
    )
    capacity_factor: float = Field(
        2.0, gt=0, description="static: rows a rank has room for over its tokens' choices; too few are an error"
    )
    max_load: float | None = Field(
        4.0, gt=0, description="rows of a rank's experts at a time over the mean; more take rounds; None: all at once"
    )
    combine: Literal["exact", "presum"] = Field(
        "exact", description="presum: ranks add up a token's results before they travel; rounding depends on the layout"
    )

    @model_validator(mode="after")
    def _check(self):
        if self.combine == "presum" and (self.dispatcher == "fused" or self.dispatch_mode == "static"):
            raise ValueError(
                f"combine=presum is a way of dispatcher=all_to_all with dispatch_mode=exact, got "
                f"dispatcher={self.dispatcher} and dispatch_mode={self.dispatch_mode}"
            )
        return self


class Fp8Config(ConfigBase):
    enabled: bool = Field(
        False, description="projections, feed-forward layers and experts multiply in float8 (e4m3, block scales)"
    )


class CheckpointConfig(ConfigBase):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: none but the final one")
    keep_last: int = Field(2, ge=1, description="how many checkpoints stay on disk")
    background: bool = Field(
        False, description="write from a copy in CPU memory while training goes on, instead of waiting for the disk"
    )
    final: bool = Field(True, description="save a checkpoint at the last step")
    export_hf: bool = Field(True, description="write a Hugging Face directory at the end of the run")
    export_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of the exported weights")


class ValidationConfig(ConfigBase):
    every: int = Field(0, ge=0, description="steps between validations; 0: only at the end")
    max_packs: int | None = Field(None, ge=1, description="validate on this many packs at most; None: on all")


class LogConfig(ConfigBase):
    every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="write TensorBoard events too")
    reference_losses: dict[str, float] = Field({}, description="named levels to draw into the loss curve")
    profile_from: int = Field(0, ge=0, description="first step (from 1) that torch's profiler records; 0: none")
    profile_steps: int = Field(3, ge=1, description="how many steps it records, into run_dir/profile")
    hang_timeout_s: float = Field(
        900.0, ge=0, description="end a run of several ranks that makes no progress for this long; 0: never"
    )
    rank_report_every: int = Field(100, ge=0, description="steps between comparisons of the ranks' speed; 0: none")
    sample_prompts: tuple[str, ...] = Field((), description="texts continued by the exported model after the run")


class TrainConfig(ConfigBase):
    """Everything `python -m xtuner.run train` needs to know."""

    model: ModelSource = Field(description="which model")
    data: DataConfig = Field(description="which data, and how it is packed")
    run_dir: Path = Field(Path("runs/train"), description="where the run's config, metrics and checkpoints go")
    seed: int = Field(0, ge=0, description="of fresh weights and of the data order")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    num_threads: int | None = Field(None, ge=1, description="CPU threads per rank; None: cores / local ranks")
    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    global_batch_size: int = Field(1, gt=0, description="packs per optimizer step, over all ranks")
    micro_batch_size: int = Field(1, gt=0, description="packs per forward pass on one rank")
    loss: LossConfig = Field(LossConfig(), description="auxiliary losses")
    optim: OptimConfig = Field(OptimConfig(), description="AdamW or Muon")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="learning rate over the steps")
    parallel: ParallelConfig = Field(ParallelConfig(), description="sharding and precision")
    memory: MemoryConfig = Field(MemoryConfig(), description="what is recomputed or kept on the host")
    fp8: Fp8Config = Field(Fp8Config(), description="products in float8")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="what is saved, and when")
    validation: ValidationConfig = Field(ValidationConfig(), description="held-out loss")
    log: LogConfig = Field(LogConfig(), description="metrics and samples")

    @model_validator(mode="after")
    def _check(self):
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} + schedule.decay_steps="
                f"{self.schedule.decay_steps} exceed steps={self.steps}"
            )
        if self.fp8.enabled and self.memory.offload_parameters:
            raise ValueError(
                "fp8.enabled=true gathers weights as float8 from the device, but memory.offload_parameters=true keeps "
                "them on the host; use memory.offload_optimizer instead"
            )
        if self.optim.kind == "muon" and self.memory.offload_optimizer:
            raise ValueError(
                "memory.offload_optimizer=true brings one parameter's state at a time, but optim.kind=muon exchanges "
                "matrices of many; use memory.offload_parameters, or optim.kind=adamw"
            )
        if self.schedule.kind == "wsd" and not self.schedule.decay_steps:
            raise ValueError("schedule.kind=wsd needs schedule.decay_steps > 0")
        return self
