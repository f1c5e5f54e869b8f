"""Which layers of a model compute in float8."""

from __future__ import annotations

from torch import nn

from xtuner.errors import ConfigError
from xtuner.nn.linear import Linear
from xtuner.nn.mlp import MLP
from xtuner.nn.moe import MoE

BLOCK = 128


def use_fp8(layers: nn.ModuleList) -> None:
    """Let the projections, feed-forward layers and experts inside `layers` multiply in float8.

    Norms, routers, attention itself, embedding and head stay as they are: little work, and sensitive.

    Raises:
        ConfigError: a matrix whose rows or columns are no multiple of 128.
    """
    for name, module in layers.named_modules():
        if isinstance(module, (Linear, MLP, MoE)):
            for parameter_name, rows, columns in _matrices(module):
                if rows % BLOCK or columns % BLOCK:
                    raise ConfigError(
                        f"fp8.enabled=true: layers.{name}.{parameter_name} is made of {rows} x {columns} matrices, but "
                        f"float8 needs multiples of {BLOCK}; train in bfloat16 instead (fp8.enabled=false, "
                        "parallel.compute_dtype=bfloat16)"
                    )
            module.fp8 = True


def _matrices(module: nn.Module) -> list[tuple[str, int, int]]:
    stacked = getattr(module, "stacked", {})
    parameters = [(name, p) for name, p in module.named_parameters(recurse=False) if p.ndim == 2]
    return [(name, p.shape[0] // stacked.get(name, 1), p.shape[1]) for name, p in parameters]
