"""Dispatch and combine over 2, 4 and 8 ranks of this machine, against torch's all-to-all.

Every rank is a process with one thread. The rival is permute, all_to_all_single over gloo with uneven splits, and
unpermute, with the project's own permute and unpermute. Times are those of the slowest rank: barrier to barrier, both
ways in turns. Also prints bytes moved and how long copying them would take all ranks at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import cpu_name

import xtuner
from xtuner import _C
from xtuner.parallel import AllToAllDispatcher, FusedDispatcher

# tokens per rank, experts per token, experts, hidden
SHAPES = [(1024, 4, 32, 2048), (1024, 8, 128, 2048), (4096, 8, 64, 2048)]
WORLDS = [2, 4, 8]
DTYPES = [torch.bfloat16, torch.float32]


def slowest_rank(call) -> float:
    """Seconds from the moment all ranks are ready to the moment all are done."""
    dist.barrier()
    start = time.perf_counter()
    call()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def bytes_moved(route, row_bytes: int) -> float:
    """Bytes that this rank's part of dispatch and combine must read and write, each row of each copy once."""
    tokens, rows = route.dest.shape[0], route.origin.shape[0]
    rank, experts_here = dist.get_rank(), route.offsets.numel() - 1
    own_rows = int(route.counts[rank, rank * experts_here : (rank + 1) * experts_here].sum())
    sent, received = int(route.tokens[rank].sum()), int(route.tokens[:, rank].sum())
    dispatch = tokens + sent + received + rows  # read x, write to peers; read the buffer, write the rows
    combine = 2 * (rows - own_rows) + int((route.dest[..., 0] >= 0).sum()) + tokens  # show, gather, write
    return (dispatch + combine) * row_bytes


def measure(shape, dtype: torch.dtype, budget_s: float, fused: FusedDispatcher, rival: AllToAllDispatcher) -> dict:
    tokens, k, experts, hidden = shape
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    # Popularity falls off slowly, so that ranks get unequal loads.
    popularity = 1 / (1 + torch.arange(experts)) ** 0.3
    idx = (torch.rand(tokens, experts, generator=generator).log() / popularity).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator)

    def run(dispatcher):
        rows = dispatcher.dispatch(x, idx, experts)
        return dispatcher.combine(rows.x, rows, weights)

    assert torch.equal(run(fused), run(rival)), "the two ways differ"
    moved = bytes_moved(fused.dispatch(x, idx, experts).route, hidden * x.element_size())
    source, target = torch.ones(int(moved) // 8), torch.empty(int(moved) // 8)  # a copy reads and writes
    calls = {"ours": lambda: run(fused), "all_to_all": lambda: run(rival), "memcpy": lambda: target.copy_(source)}
    samples = {name: [slowest_rank(call)] for name, call in calls.items()}
    rounds = max(3, min(15, int(budget_s / sum(s[0] for s in samples.values()))))
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(slowest_rank(call))
    total = torch.tensor(moved)
    dist.all_reduce(total)
    return {"seconds": {name: statistics.median(s) for name, s in samples.items()}, "bytes_moved": total.item()}


def rank_main(rank: int, world_size: int, rendezvous: str, budget_s: float, results: str) -> None:
    torch.set_num_threads(1)
    _C.keep_freed_memory()  # as in a training run; the rival gains as much
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    fused, rival = FusedDispatcher(), AllToAllDispatcher()
    rows = []
    for shape in SHAPES:
        if shape[0] * world_size > 16384:  # the rival alone would take longer than the whole benchmark may
            continue
        for dtype in DTYPES:
            row = measure(shape, dtype, budget_s, fused, rival)
            row |= {"ranks": world_size, "shape": "T{} K{} E{} H{}".format(*shape), "dtype": str(dtype).split(".")[1]}
            rows.append(row)
            if rank == 0:
                show(row)
    if rank == 0:
        Path(results).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def show(row: dict) -> None:
    ours, rival, copy = (row["seconds"][name] for name in ("ours", "all_to_all", "memcpy"))
    row["wall_speedup_over_all_to_all"] = round(rival / ours, 2)
    row["share_of_memcpy"] = round(copy / ours, 2)
    print(
        f"{row['ranks']} ranks  {row['shape']:22s} {row['dtype']:9s} {ours * 1e3:8.2f} ms"
        f" {row['bytes_moved'] / ours / 1e9:6.1f} GB/s  {rival / ours:6.2f}x all_to_all"
        f"  {100 * copy / ours:4.0f} % of memcpy",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per case")
    parser.add_argument("--json", type=Path, help="add the results to this JSON file")
    args = parser.parse_args()
    rows = []
    for world_size in args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            results = os.path.join(directory, "results.json")
            arguments = (world_size, os.path.join(directory, "rendezvous"), args.budget, results)
            mp.spawn(rank_main, arguments, nprocs=world_size)
            rows += json.loads(Path(results).read_text())
    speedups = {r: [row["wall_speedup_over_all_to_all"] for row in rows if row["ranks"] == r] for r in args.ranks}
    geomean = {f"dispatch + combine, {r} ranks, over all_to_all": round(statistics.geometric_mean(s), 2)
               for r, s in speedups.items()}
    for name, mean in geomean.items():
        print(f"geomean {mean:.2f}x  {name}")
    if args.json:
        info = xtuner.build_info()
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "isa": info["isa"], "torch": torch.__version__,
                   "load_average_at_end": [round(x, 1) for x in os.getloadavg()]}
        everything = json.loads(args.json.read_text()) if args.json.exists() else {}
        everything["Expert-parallel dispatch and combine"] = {"machine": machine, "geomean": geomean, "cases": rows}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
