"""Fine-tune SmolLM2-135M-Instruct on the generated tasks, with its own chat template; only answers are learned."""

from pathlib import Path

from xtuner.config import (
    CheckpointConfig,
    DataConfig,
    ModelSource,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)

HERE = Path("runs/sft_smollm2")

config = TrainConfig(
    model=ModelSource(path=HERE / "model"),
    # Packs as short as the longest sample: best-fit packing would otherwise fill a pack with one task's equal lengths.
    data=DataConfig(train=(HERE / "tasks/train.jsonl",), pack_max_length=64, cache_dir=HERE / "cache"),
    run_dir=HERE / "train",
    steps=100,
    global_batch_size=12,
    micro_batch_size=12,
    optim=OptimConfig(lr=1e-4, weight_decay=0.01),
    schedule=ScheduleConfig(kind="linear", warmup_steps=10),
    # One process needs no resharding; the export is the result, so no checkpoint to resume from is kept.
    parallel=ParallelConfig(reshard_after_forward=False),
    checkpoint=CheckpointConfig(final=False, export_dtype="float32"),
)
