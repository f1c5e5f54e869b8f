"""Typed configuration: one tree, validated once, saved beside the run."""

from xtuner.config.base import ConfigBase
from xtuner.config.data import DataConfig
from xtuner.config.load import LoadedConfig, describe_fields, load_config, recipe_names, save_config, with_overrides
from xtuner.config.memory import MemoryConfig
from xtuner.config.model import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from xtuner.config.train import (
    CheckpointConfig,
    Fp8Config,
    LogConfig,
    LossConfig,
    ModelSource,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigBase",
    "DataConfig",
    "Fp8Config",
    "LoadedConfig",
    "LogConfig",
    "LossConfig",
    "MLAConfig",
    "MemoryConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelSource",
    "OptimConfig",
    "ParallelConfig",
    "RopeConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ValidationConfig",
    "describe_fields",
    "load_config",
    "recipe_names",
    "save_config",
    "with_overrides",
]
