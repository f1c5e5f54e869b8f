"""The layout of a run: which ranks share weights, experts and sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xtuner.batch import Batch
from xtuner.config import ModelConfig, ParallelConfig
from xtuner.errors import ConfigError
from xtuner.parallel.world import World


@dataclass(frozen=True)
class Layout:
    """Meshes over all ranks. Neighbouring ranks share a sequence, then the experts, then the sharded weights.

    dense         ([replicate,] shard): weights outside the experts
    expert_shard  ([replicate,] expert_shard): the experts of one rank, over the ranks that hold the same ones; None
                  without expert parallelism, when experts are sharded like everything else
    ep            (ep): ranks that hold different experts; None without expert parallelism
    sp            (sp): ranks that hold different slices of the same tokens; None without sequence parallelism
    data_rank, data_size  which share of the data this rank sees
    halves        whether batches are cut in two, for halves to take turns in each layer
    """

    dense: DeviceMesh
    expert_shard: DeviceMesh | None
    ep: DeviceMesh | None
    sp: DeviceMesh | None
    data_rank: int
    data_size: int
    halves: bool

    def slice(self, batch: Batch) -> Batch:
        """This rank's tokens of a batch on the host that its sequence-parallel group shares, cut in two if wanted."""
        batch = batch.halve() if self.halves else batch
        return batch if self.sp is None else batch.slice(self.sp.get_local_rank(), self.sp.size())


def build_layout(cfg: ParallelConfig, arch: ModelConfig, world: World) -> Layout:
    """Make the process groups. Collective.

    Raises:
        ConfigError: degrees that do not fit the ranks, each other, or the model.
    """
    check_layout(cfg, arch, world.size)
    shard_size = cfg.shard_size or world.size
    replicate_size, data_size = world.size // shard_size, world.size // cfg.sp_size

    def mesh(**axes: int) -> DeviceMesh:
        if replicate_size > 1:
            axes = {"replicate": replicate_size, **axes}
        return init_device_mesh(world.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    expert_shard = ep = sp = None
    if cfg.ep_size > 1:
        experts = mesh(expert_shard=shard_size // cfg.ep_size, ep=cfg.ep_size)
        expert_shard, ep = experts[experts.mesh_dim_names[:-1]], experts["ep"]
    if cfg.sp_size > 1:
        axes = (data_size, cfg.sp_size)
        sp = init_device_mesh(world.device.type, axes, mesh_dim_names=("data", "sp"))["sp"]
    return Layout(
        dense=mesh(shard=shard_size),
        expert_shard=expert_shard,
        ep=ep,
        sp=sp,
        data_rank=world.rank // cfg.sp_size,
        data_size=data_size,
        halves=cfg.intra_layer_micro_batches == 2,
    )


def check_layout(cfg: ParallelConfig, arch: ModelConfig, num_ranks: int) -> None:
    """Raises ConfigError unless the degrees of `cfg` fit `num_ranks`, each other, and the model."""
    _divides("ranks", num_ranks, "parallel.sp_size", cfg.sp_size)
    shard_size = cfg.shard_size or num_ranks
    _divides("ranks", num_ranks, "parallel.shard_size", shard_size)
    if cfg.ep_size > 1:
        _divides("parallel.shard_size" if cfg.shard_size else "ranks", shard_size, "parallel.ep_size", cfg.ep_size)
        if arch.moe is None:
            raise ConfigError(f"parallel.ep_size={cfg.ep_size} needs a mixture of experts, but the model is dense")
        _divides("moe.num_experts", arch.moe.num_experts, "parallel.ep_size", cfg.ep_size)
        experts, ranks = arch.moe.num_experts // cfg.ep_size, shard_size // cfg.ep_size
        for width, name in ((2 * arch.moe.moe_intermediate_size, "2 x moe_intermediate_size"),
                            (arch.hidden_size, "hidden_size")):  # fmt: skip
            if experts * width % ranks:
                raise ConfigError(
                    f"the {experts} experts of one rank have {experts} x {name} = {experts * width} rows, which do not "
                    f"divide among the {ranks} ranks (parallel.shard_size={shard_size} / parallel.ep_size="
                    f"{cfg.ep_size}) that hold them"
                )
    if cfg.sp_size > 1:
        _divides("num_attention_heads", arch.num_attention_heads, "parallel.sp_size", cfg.sp_size)
        heads = arch.num_key_value_heads
        if heads % cfg.sp_size and cfg.sp_size % heads:
            raise ConfigError(
                f"num_key_value_heads={heads} and parallel.sp_size={cfg.sp_size}: one must divide the other"
            )


def _divides(whole: str, number: int, part: str, divisor: int) -> None:
    if number % divisor:
        raise ConfigError(f"{whole}={number} is not divisible by {part}={divisor}")
