"""A whole training step, forward + backward + AdamW: our decoder against transformers' Qwen3-MoE.

    python bench/e2e.py [--dtype bfloat16 …] [--json FILE] [--profile]

All sides start from the same weights, see the same tokens and use the same optimizer, threads and dtype, in one
process. They take turns step by step, so that whatever else runs on the machine disturbs all of them alike; read the
best step where it is not idle. Losses are compared at every step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

# Threads that spin while they wait steal the cores from whoever works; read by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import xtuner  # noqa: E402
from xtuner.models import build_model, config_from_hf, hf_map  # noqa: E402

# Relative; rounding is amplified by every optimizer step, so the first step is held to more.
LOSS_TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-2, 3e-2)}
# batched_mm copies the weights of every chosen expert for every token; above this it would not fit.
MAX_BATCHED_BYTES = 2 << 30


@dataclass
class Side:
    """One contender: `loss(input_ids [B, S])` runs its forward pass."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)

    def step(self, ids: Tensor) -> None:
        cpu, start = time.process_time(), time.perf_counter()
        loss = self.loss(ids)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        self.losses.append(loss.item())
        self.seconds.append(
            {
                "step": end - start,
                "forward": forward - start,
                "backward": backward - forward,
                "optimizer": end - backward,
                "cpu": time.process_time() - cpu,
            }
        )

    def loss(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class Ours(Side):
    def loss(self, ids: Tensor) -> Tensor:
        num_documents, length = ids.shape
        labels = torch.roll(ids, -1, dims=1).flatten()
        weights = torch.ones(ids.shape)
        weights[:, -1] = 0
        output = self.model(
            ids.flatten(),
            torch.arange(length).repeat(num_documents)[None],
            torch.arange(0, ids.numel() + 1, length, dtype=torch.int32),
            length,
            labels=labels,
            loss_weights=weights.flatten(),
        )
        return output.loss_sum / weights.sum()


class Theirs(Side):
    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss


def make_sides(args: argparse.Namespace, dtype: torch.dtype) -> list[Side]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        moe_intermediate_size=args.inter,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        num_experts=args.experts,
        num_experts_per_tok=args.topk,
        norm_topk_prob=True,
        max_position_embeddings=max(2048, args.seq),
        tie_word_embeddings=False,
        use_cache=False,
        output_router_logits=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    first = Qwen3MoeForCausalLM(config).to(dtype).train()
    arch = config_from_hf(config.to_dict())
    ours = build_model(arch).to(dtype)
    copy_weights(first, ours, hf_map(arch))
    sides: list[Side] = [Ours("xtuner", ours, _adamw(ours))]
    for implementation in args.implementations:
        # A model keeps the config it is given and reads its implementation there, so each needs its own.
        theirs = Qwen3MoeForCausalLM(copy.deepcopy(config)).to(dtype).train()
        theirs.load_state_dict(first.state_dict())
        theirs.set_experts_implementation(implementation)
        sides.append(Theirs(f"transformers {implementation}", theirs, _adamw(theirs)))
    for side, implementation in zip(sides[1:], args.implementations, strict=True):
        in_use = side.model.model.layers[0].mlp.experts.config._experts_implementation
        if in_use != implementation:
            raise RuntimeError(f"asked transformers for {implementation}, got {in_use}")
    return sides


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: nn.Module, name_map) -> None:
    """Through the name map of checkpoints, which keep apart the experts that transformers fuses in memory."""
    tensors = theirs.state_dict()
    for name in [name for name in tensors if ".experts." in name]:
        prefix, fused = name.rsplit(".", 1)
        for e, weight in enumerate(tensors.pop(name)):
            parts = weight.chunk(2) if fused == "gate_up_proj" else (weight,)
            kinds = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
            for kind, part in zip(kinds, parts, strict=True):
                tensors[f"{prefix}.{e}.{kind}.weight"] = part
    for name, param in ours.named_parameters():
        param.copy_(torch.cat([tensors[part.hf_name] for part in name_map[name]]))


def check_losses(sides: list[Side], dtype: torch.dtype) -> float:
    """The largest relative difference to ours at any step. Raises AssertionError where it is too large."""
    first, later = LOSS_TOLERANCE[dtype]
    worst = 0.0
    for side in sides[1:]:
        for step, (a, b) in enumerate(zip(sides[0].losses, side.losses, strict=True)):
            difference = abs(a - b) / abs(b)
            worst = max(worst, difference)
            if not difference <= (later if step else first):
                raise AssertionError(f"step {step}: loss {a} of xtuner, {b} of {side.name}")
    return worst


def summarise(side: Side, warmup: int, num_tokens: int) -> dict:
    timed = side.seconds[warmup:]
    best = min(timed, key=lambda seconds: seconds["step"])
    median = statistics.median(seconds["step"] for seconds in timed)
    return {
        "name": side.name,
        "median_s": round(median, 3),
        "best_s": round(best["step"], 3),
        "best_forward_s": round(best["forward"], 3),
        "best_backward_s": round(best["backward"], 3),
        "best_optimizer_s": round(best["optimizer"], 3),
        "least_cpu_s": round(min(seconds["cpu"] for seconds in timed), 3),
        "tokens_per_s_median": round(num_tokens / median, 1),
        "tokens_per_s_best": round(num_tokens / best["step"], 1),
        "losses": side.losses,
    }


def describe_machine() -> dict:
    import transformers

    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "isa": xtuner.build_info()["isa"],
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "xtuner": xtuner.__version__,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def print_results(results: list[dict]) -> None:
    print(f"{'':28}{'median s':>10}{'best s':>9}{'fwd':>8}{'bwd':>8}{'AdamW':>8}{'CPU s':>8}{'tok/s':>8}{'best':>8}")
    for r in results:
        numbers = (r["median_s"], r["best_s"], r["best_forward_s"], r["best_backward_s"], r["best_optimizer_s"])
        cells = "".join(f"{n:>{w}.2f}" for n, w in zip(numbers, (10, 9, 8, 8, 8), strict=True))
        print(f"{r['name']:28}{cells}{r['least_cpu_s']:>8.2f}{r['tokens_per_s_median']:>8.0f}{r['tokens_per_s_best']:>8.0f}")


def speedups(results: list[dict]) -> dict[str, float]:
    """How many times faster we are than the best of the others, by each measure."""
    ours, others = results[0], results[1:]
    return {key: round(min(o[key] for o in others) / ours[key], 3) for key in ("median_s", "best_s", "least_cpu_s")}


def profile_ours(side: Side, ids: Tensor) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        side.step(ids)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=48))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    for name, value in dict(batch=4, seq=512, layers=8, hidden=512, experts=32, topk=4, inter=256, vocab=8192).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager", "batched_mm"])
    parser.add_argument("--profile", action="store_true", help="print where one of our steps spends its time")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    machine = describe_machine()
    num_tokens = args.batch * args.seq
    copied = num_tokens * args.topk * 3 * args.hidden * args.inter * dtype.itemsize
    if "batched_mm" in args.implementations and copied > MAX_BATCHED_BYTES:
        print(f"without batched_mm, which would copy {copied / 2**30:.0f} GiB of weights per layer at this shape")
        args.implementations.remove("batched_mm")
    sides = make_sides(args, dtype)
    num_params = sum(p.numel() for p in sides[0].model.parameters())
    size = f"{num_params / 1e6:.1f} M parameters"
    print(f"{size}, {args.dtype}, {num_tokens} tokens a step, {args.threads} threads", flush=True)
    generator = torch.Generator().manual_seed(1)
    gc.disable()
    for _ in range(args.warmup + args.steps):
        ids = torch.randint(0, args.vocab, (args.batch, args.seq), generator=generator)
        for side in sides:
            side.step(ids)
        gc.collect()
    worst = check_losses(sides, dtype)
    results = [summarise(side, args.warmup, num_tokens) for side in sides]
    print_results(results)
    faster = speedups(results)
    ratios = ", ".join(f"{faster[key]:.2f} ({key})" for key in faster)
    print(f"losses agree within {worst:.1e}; times of the best of transformers over ours: {ratios}")
    if args.profile:
        profile_ours(sides[0], ids)
    if args.json:
        shape = {k: v for k, v in vars(args).items() if k not in ("json", "profile")}
        rss = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        report = {
            "machine": machine, "shape": shape, "parameters": num_params, "results": results, "speedup": faster,
            "largest_relative_loss_difference": worst, "peak_rss_gib_all_sides": rss,
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
