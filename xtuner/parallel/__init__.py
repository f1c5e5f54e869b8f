"""Who owns which shard: process groups, meshes, FSDP2 and the way of tokens to experts."""

from xtuner.parallel.dispatch import AllToAllDispatcher, FusedDispatcher, check_overflow
from xtuner.parallel.layout import Layout, build_layout, check_layout
from xtuner.parallel.parallelize import materialize, parallelize
from xtuner.parallel.shards import local_rows, whole
from xtuner.parallel.world import World, init_world, leave_world

__all__ = [
    "AllToAllDispatcher", "FusedDispatcher", "Layout", "World", "build_layout", "check_layout", "check_overflow",
    "init_world", "leave_world", "local_rows", "materialize", "parallelize", "whole",
]  # fmt: skip
