"""What each rank of the FSDP exchange test does; apart from the test, so that ranks need not import transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from xtuner.checkpoint.hf import load_hf, save_hf
from xtuner.config import ParallelConfig
from xtuner.models import build_model, config_from_hf, config_to_hf, hf_map
from xtuner.parallel import World, build_layout, leave_world, parallelize


def load_compute_save(rank: int, root: Path, ids: torch.Tensor) -> None:
    """Load root/theirs into a sharded model, leave its logits in root/logits-<rank>.pt, save it as root/ours."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=2)
    cfg = config_from_hf(root / "theirs")
    world, parallel = World(rank, rank, 2, 2, torch.device("cpu")), ParallelConfig()
    model = parallelize(build_model(cfg, "meta"), build_layout(parallel, cfg, world), parallel, world)
    model.to_empty(device="cpu")
    load_hf(model, hf_map(cfg), root / "theirs")
    length = len(ids)
    with torch.no_grad():
        output = model(ids, torch.arange(length)[None], torch.tensor([0, length], dtype=torch.int32), length)
    torch.save(output.logits, root / f"logits-{rank}.pt")
    save_hf(model, hf_map(cfg), root / "ours", config=config_to_hf(cfg), max_shard_bytes=30_000)
    leave_world()
