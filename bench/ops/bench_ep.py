"""Dispatch and combine over 2, 4 and 8 ranks of this machine, against torch's all-to-all.

Every rank is a process with one thread. The rival is permute, all_to_all_single over gloo with uneven splits, and
unpermute, with the project's own permute and unpermute. The experts' results lie where the expert product of each way
leaves them. Wall times are those of the slowest rank, barrier to barrier,
in turns; in brackets the same by CPU time of all ranks together, which other load disturbs less. The last column
compares with a plain copy of as many bytes by all ranks at once.
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
from timing import Timing, cpu_name

import xtuner
from xtuner import _C
from xtuner.parallel import AllToAllDispatcher, FusedDispatcher, leave_world

# tokens per rank, experts per token, experts, hidden
SHAPES = [(1024, 4, 32, 2048), (1024, 8, 128, 2048), (2048, 8, 64, 2048), (4096, 4, 32, 2048)]
WORLDS = [2, 4, 8]
DTYPES = [torch.bfloat16, torch.float32]


def time_all_ranks(call) -> Timing:
    """Wall seconds of the slowest rank, and CPU seconds of all threads of all ranks."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = torch.tensor(time.perf_counter() - wall), torch.tensor(time.process_time() - cpu)
    dist.all_reduce(wall, dist.ReduceOp.MAX)
    dist.all_reduce(cpu)
    return Timing(wall.item(), cpu.item())


def bytes_moved(route, row_bytes: int) -> float:
    """Bytes that this rank's part of dispatch and combine must read and write, each row of each copy once."""
    tokens, sent = route.dest.shape[0], int((route.dest[..., 0] >= 0).sum())
    return 2 * (tokens + sent) * row_bytes  # read x, write to peers; gather from peers, write the sums


def measure(shape, dtype: torch.dtype, budget_s: float, fused: FusedDispatcher, rival: AllToAllDispatcher) -> dict:
    tokens, k, experts, hidden = shape
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    # Popularity falls off slowly, so that ranks get unequal loads.
    popularity = 1 / (1 + torch.arange(experts)) ** 0.3
    idx = (torch.rand(tokens, experts, generator=generator).log() / popularity).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator)

    # What comes back from the experts lies where their last product writes it.
    first_rows = rival.dispatch(x, idx, experts).x
    y = {fused: fused.group.share(first_rows), rival: first_rows}

    def run(dispatcher):
        rows = dispatcher.dispatch(x, idx, experts)
        assert rows.x.shape == y[dispatcher].shape
        return dispatcher.combine(y[dispatcher], rows, weights)

    assert torch.equal(fused.dispatch(x, idx, experts).x, first_rows), "the two ways dispatch differently"
    assert torch.equal(run(fused), run(rival)), "the two ways combine differently"
    moved = bytes_moved(fused.dispatch(x, idx, experts).route, hidden * x.element_size())
    source, target = torch.ones(int(moved) // 8), torch.empty(int(moved) // 8)  # a copy reads and writes
    calls = {"ours": lambda: run(fused), "all_to_all": lambda: run(rival), "memcpy": lambda: target.copy_(source)}
    first = {name: time_all_ranks(call) for name, call in calls.items()}
    rounds = max(3, min(15, int(budget_s / sum(t.wall for t in first.values()))))
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(time_all_ranks(call))
    total = torch.tensor(moved)
    dist.all_reduce(total)
    medians = {name: Timing(*map(statistics.median, zip(*s, strict=True))) for name, s in samples.items()}
    return {
        "wall_us": {name: round(t.wall * 1e6) for name, t in medians.items()},
        "cpu_us": {name: round(t.cpu * 1e6) for name, t in medians.items()},
        "bytes_moved": round(total.item()),
    }


def rank_main(rank: int, world_size: int, rendezvous: str, budget_s: float, results: str) -> None:
    torch.set_num_threads(1)
    _C.keep_freed_memory()  # as in a training run; the rival gains as much
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    fused, rival = FusedDispatcher(), AllToAllDispatcher()
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES if shape[0] == 1024 else DTYPES[:1]:  # the rival is too slow for more
            row = measure(shape, dtype, budget_s, fused, rival)
            row |= {"ranks": world_size, "shape": "T{} K{} E{} H{}".format(*shape), "dtype": str(dtype).split(".")[1]}
            rows.append(row)
            if rank == 0:
                show(row)
    if rank == 0:
        Path(results).write_text(json.dumps(rows))
    dist.barrier()
    leave_world()


def show(row: dict) -> None:
    ours = {kind: row[f"{kind}_us"]["ours"] for kind in ("wall", "cpu")}
    over = {kind: {n: round(t / ours[kind], 3) for n, t in row[f"{kind}_us"].items() if n != "ours"} for kind in ours}
    row |= {"wall_speedup_over": over["wall"], "cpu_speedup_over": over["cpu"]}
    wall, cpu = over["wall"], over["cpu"]
    print(
        f"{row['ranks']} ranks  {row['shape']:22s} {row['dtype']:9s} {ours['wall']:9.0f} us"
        f" {row['bytes_moved'] / ours['wall'] / 1e3:6.1f} GB/s  {wall['all_to_all']:.2f}x ({cpu['all_to_all']:.2f}x)"
        f" all_to_all  {wall['memcpy']:.2f}x ({cpu['memcpy']:.2f}x) memcpy",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds per case")
    parser.add_argument("--json", type=Path, help="add the results to this JSON file")
    args = parser.parse_args()
    rows = []
    for world_size in args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            results = os.path.join(directory, "results.json")
            arguments = (world_size, os.path.join(directory, "rendezvous"), args.budget, results)
            mp.spawn(rank_main, arguments, nprocs=world_size)
            rows += json.loads(Path(results).read_text())
    geomean = {}
    for ranks in args.ranks:
        for rival in ("all_to_all", "memcpy"):
            means = {
                kind: statistics.geometric_mean(
                    row[f"{kind}_speedup_over"][rival] for row in rows if row["ranks"] == ranks
                )
                for kind in ("wall", "cpu")
            }
            geomean[f"{ranks} ranks, over {rival}"] = {kind: round(mean, 3) for kind, mean in means.items()}
            print(f"geomean {means['wall']:.2f}x ({means['cpu']:.2f}x)  {ranks} ranks, over {rival}")
    if args.json:
        info = xtuner.build_info()
        machine = {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_average_at_end": [round(x, 1) for x in os.getloadavg()],
            "isa": info["isa"],
            "compiler": info["compiler"],
            "xtuner": info["version"],
            "torch": torch.__version__,
        }
        everything = json.loads(args.json.read_text()) if args.json.exists() else {}
        everything["Expert-parallel dispatch and combine"] = {"machine": machine, "geomean": geomean, "cases": rows}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
