"""A whole training step under expert parallelism: the fused dispatcher against torch's all-to-all.

    python bench/ep_step.py [--ranks 2 4] [--dtype bfloat16] [--json FILE]

Each rank is a process with one thread; experts are split over all ranks, everything else is sharded over them. Both
sides start from the same weights, see the same tokens and take turns step by step in the same processes; their losses
must be equal. A step is forward, backward, clipping and AdamW, barrier to barrier, the slowest rank's time.

Dispatch and combine, forward and backward, are timed in steps of their own, in which all ranks meet before each of
them, so that waiting for a rank that still computes is not counted: wall time is the mean over ranks, CPU time that of
all threads of all ranks, which other load disturbs less. The default shape is heavy on communication: many choices per
token of narrow experts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "ops")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from timing import cpu_name  # noqa: E402

import xtuner  # noqa: E402
from xtuner.config import LossConfig, ModelConfig, OptimConfig, ParallelConfig  # noqa: E402
from xtuner.data import collate  # noqa: E402
from xtuner.data.dataset import Pack  # noqa: E402
from xtuner.engine.train_step import train_step  # noqa: E402
from xtuner.models import build_model  # noqa: E402
from xtuner.optim import build_adamw  # noqa: E402
from xtuner.parallel import build_layout, init_world, leave_world, parallelize  # noqa: E402

SIDES = ("fused", "all_to_all")


def now() -> np.ndarray:
    """Seconds of wall time, and of CPU time of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


class Clock:
    """Adds up the seconds between an opening mark, at which all ranks meet, and the next closing one."""

    def __init__(self):
        self.running, self.total = False, np.zeros(2)

    def open(self) -> None:
        if self.running:
            dist.barrier()
        self.opened = now()

    def close(self) -> None:
        self.total += now() - self.opened

    def read(self) -> np.ndarray:
        total, self.total = self.total, np.zeros(2)
        return total


class Mark(torch.autograd.Function):
    """Does nothing but call `clock` when the gradient comes by: what opens in forward closes in backward."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.call()
        return grad, None


class Timed:
    """A dispatcher with a clock around its two ways."""

    def __init__(self, dispatcher, clock: Clock):
        self.dispatcher, self.clock = dispatcher, clock

    def run(self, experts, x_TD, topk_idx_TK, weights_TK, num_experts):
        clock = self.clock
        clock.open()
        tokens = self.dispatcher.dispatch(Mark.apply(x_TD, clock.close), topk_idx_TK, num_experts)
        clock.close()
        y_RD = experts(tokens._replace(x=Mark.apply(tokens.x, clock.open)))
        clock.open()
        out_TD = self.dispatcher.combine(Mark.apply(y_RD, clock.close), tokens, weights_TK)
        clock.close()
        return Mark.apply(out_TD, clock.open)


class Side:
    def __init__(self, name: str, arch: ModelConfig, dtype: str, world):
        cfg = ParallelConfig(ep_size=world.size, dispatcher=name, compute_dtype=dtype, max_load=None)
        self.world, self.clock = world, Clock()
        self.samples: dict[str, list] = {"step": [], "moved": []}
        self.model = parallelize(build_model(arch, "meta"), build_layout(cfg, arch, world), cfg, world)
        self.model.to_empty(device="cpu")
        self.model.init_weights(seed=0)
        for layer in self.model.layers:
            layer.moe.dispatcher = Timed(layer.moe.dispatcher, self.clock)
        self.optimizer = build_adamw(self.model, OptimConfig())

    def step(self, batch) -> float:
        """Loss. Keeps the seconds of the step, by wall time of the slowest rank and by CPU time of all."""
        self.world.barrier()
        start = now()
        result = train_step(self.model, self.optimizer, [batch], LossConfig(), 1.0, self.world)
        seconds = torch.from_numpy(now() - start)
        dist.all_reduce(seconds[:1], dist.ReduceOp.MAX)
        dist.all_reduce(seconds[1:])
        self.samples["step"].append(seconds.tolist())
        return result.loss

    def timed_step(self, batch) -> float:
        """Loss. Keeps the seconds of dispatch and combine, by wall time of the mean rank and by CPU time of all."""
        self.clock.running = True
        result = train_step(self.model, self.optimizer, [batch], LossConfig(), 1.0, self.world)
        self.clock.running = False
        seconds = torch.from_numpy(self.clock.read())
        dist.all_reduce(seconds)
        self.samples["moved"].append([seconds[0].item() / self.world.size, seconds[1].item()])
        return result.loss


def draw_batch(args: argparse.Namespace, rng: np.random.Generator):
    documents = [rng.integers(0, args.vocab, args.seq).astype(np.int32) for _ in range(args.batch)]
    return collate([Pack(documents, [np.ones(args.seq, np.uint8)] * args.batch)])


def arch_of(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.parse({
        "family": "qwen3_moe", "vocab_size": args.vocab, "hidden_size": args.hidden, "num_hidden_layers": args.layers,
        "intermediate_size": args.hidden, "num_attention_heads": args.heads, "num_key_value_heads": args.heads,
        "head_dim": 64, "moe": {
            "num_experts": args.experts, "num_experts_per_tok": args.topk, "moe_intermediate_size": args.inter,
        },
    })  # fmt: skip


def rank_main(rank: int, world_size: int, port: int, args: argparse.Namespace, results: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    world = init_world("cpu", num_threads=1)
    sides = {name: Side(name, arch_of(args), args.dtype, world) for name in SIDES}
    rng = np.random.default_rng(rank)
    for _ in range(1 + args.steps):
        for step in (Side.step, Side.timed_step):
            batch = draw_batch(args, rng)
            losses = {name: step(side, batch) for name, side in sides.items()}
            if losses["fused"] != losses["all_to_all"]:
                raise AssertionError(f"the two dispatchers train differently: {losses}")
            for side in sides.values():
                side.clock.read()
    if world.is_main:
        medians = {
            name: {what: np.median(seconds[1:], axis=0) for what, seconds in side.samples.items()}
            for name, side in sides.items()
        }
        Path(results).write_text(json.dumps(summarise(medians, world_size)))
    world.barrier()
    leave_world()


def summarise(medians: dict, ranks: int) -> dict:
    row = {"ranks": ranks}
    for i, kind in enumerate(("wall", "cpu")):
        step, moved = ({name: float(medians[name][what][i]) for name in SIDES} for what in ("step", "moved"))
        row[kind] = {
            "step_s": {name: round(seconds, 4) for name, seconds in step.items()},
            "dispatch_and_combine_s": {name: round(seconds, 4) for name, seconds in moved.items()},
            "share_of_torch_route": round(moved["all_to_all"] / step["all_to_all"], 3),
            "removed_by_fused": round(1 - moved["fused"] / moved["all_to_all"], 3),
            "step_speedup": round(step["all_to_all"] / step["fused"], 3),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=4, help="steps of each kind and side, after one to warm up")
    shape = dict(batch=4, seq=256, layers=3, hidden=1024, heads=2, experts=32, topk=8, inter=32, vocab=512)
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--port", type=int, default=29641)
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    print(", ".join(f"{name} {getattr(args, name)}" for name in shape) + f", {args.dtype}; batch and seq on each rank")
    rows = []
    for world_size in args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            results = os.path.join(directory, "results.json")
            mp.spawn(rank_main, (world_size, args.port, args, results), nprocs=world_size)
            rows.append(json.loads(Path(results).read_text()))
        for kind in ("wall", "cpu"):
            figures = rows[-1][kind]
            step = figures["step_s"]
            print(
                f"EP {world_size}, {kind} time: step {step['all_to_all']:.3f} s with torch's all-to-all, of which "
                f"dispatch and combine {figures['share_of_torch_route']:.1%}; fused removes "
                f"{figures['removed_by_fused']:.1%} of that, {step['fused']:.3f} s: {figures['step_speedup']:.2f}x",
                flush=True,
            )
    if args.json:
        machine = {
            "cpu": cpu_name(), "cores": os.cpu_count(), "isa": xtuner.build_info()["isa"], "torch": torch.__version__,
            "load_average_at_end": [round(x, 1) for x in os.getloadavg()],
        }  # fmt: skip
        report = {"machine": machine, "dtype": args.dtype, "shape": {n: getattr(args, n) for n in shape}, "cases": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
