"""Who owns which shard: process groups, meshes and FSDP2."""

from xtuner.parallel.fsdp import shard_model
from xtuner.parallel.shards import local_rows
from xtuner.parallel.world import World, init_world

__all__ = ["World", "init_world", "local_rows", "shard_model"]
