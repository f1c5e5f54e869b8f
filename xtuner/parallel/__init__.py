"""Who owns which shard: process groups, meshes, FSDP2 and the way of tokens to experts."""

from xtuner.parallel.dispatch import AllToAllDispatcher, FusedDispatcher
from xtuner.parallel.fsdp import shard_model
from xtuner.parallel.shards import local_rows
from xtuner.parallel.world import World, init_world

__all__ = ["AllToAllDispatcher", "FusedDispatcher", "World", "init_world", "local_rows", "shard_model"]
