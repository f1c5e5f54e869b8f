"""What a run spends time on to need less device memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from xtuner.config.base import ConfigBase


class MemoryConfig(ConfigBase):
    checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what backward recomputes of a block: none; all but attention (selective); all from its input",
    )
    checkpointing_ratio: float = Field(
        1.0, ge=0, le=1, description="part of the blocks that recompute, from the first one on"
    )
    offload_activations: bool = Field(
        False, description="keep the inputs of recomputing blocks on the host between forward and backward"
    )
    offload_optimizer: bool = Field(
        False, description="keep optimizer state on the host; one parameter's at a time comes to the device"
    )
    offload_parameters: bool = Field(
        False, description="keep sharded weights, gradients and optimizer state on the host; the host updates them"
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype in which gradients are summed over ranks"
    )

    @model_validator(mode="after")
    def _check(self):
        if self.offload_activations and self.checkpointing == "none":
            raise ValueError("offload_activations=true moves the inputs of recomputing blocks: set checkpointing too")
        if self.offload_optimizer and self.offload_parameters:
            raise ValueError("offload_parameters=true already keeps optimizer state on the host")
        return self
