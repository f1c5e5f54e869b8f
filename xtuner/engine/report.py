"""What a run tells about itself: after every step, and when it is finished."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from xtuner.checkpoint.hf import save_hf
from xtuner.config import TrainConfig
from xtuner.engine.metrics import MetricsWriter, device_peak_flops, peak_memory_gib
from xtuner.engine.plot import plot_expert_load, plot_loss
from xtuner.engine.screen import Screen, format_seconds
from xtuner.engine.train_step import StepResult, load_imbalance
from xtuner.models import config_to_hf, flops_per_token, hf_map

# Times the median rank's own seconds per step, from which on a rank is called slow.
SLOW = 1.3

if TYPE_CHECKING:
    from xtuner.engine.trainer import Run


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def report_step(
    run: Run, screen: Screen, metrics: MetricsWriter | None, result: StepResult, lr: float, seconds: float
) -> None:
    tokens_per_second = result.num_tokens / seconds
    memory = peak_memory_gib(run.world.device)
    screen.step(run.step, result.loss, tokens_per_second, memory)
    if result.skipped:
        screen.note(f"step {run.step}: gradient norm is {result.grad_norm}, step skipped ({run.num_skipped} so far)")
    if metrics and (due(run.step, run.cfg.log.every) or run.step == run.cfg.steps):
        peak = device_peak_flops(run.world.device)
        flops = flops_per_token(run.arch, run.cfg.data.pack_max_length) * tokens_per_second / run.world.size
        extra = {
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "mfu": flops / peak if peak else None,
            "memory_gib": memory,
        }
        metrics.write("train", run.step, result.figures() | extra)
        if result.expert_counts is not None:
            per_layer = load_imbalance(result.expert_counts).tolist()
            metrics.write("load_imbalance", run.step, {f"layer_{i:02d}": v for i, v in enumerate(per_layer)})


def report_ranks(run: Run, screen: Screen, metrics: MetricsWriter | None, waiting_share: float) -> None:
    """Compare the ranks' own seconds per step since the last such report, collectives not counted. Collective.

    In a whole step every rank takes the time of the slowest, so the time in collectives has to be taken out. It is the
    host's time: on GPUs, where the host runs ahead, it shows slow data loading and slow hosts.
    """
    world = run.world
    steps, seconds = run.step - run.compared_at[0], run.train_seconds - run.compared_at[1]
    run.compared_at = run.step, run.train_seconds
    own = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    own[world.rank] = seconds / steps * (1 - waiting_share)
    own = world.all_reduce_sum(own)
    slowest, median = int(own.argmax()), own.median().item()
    if metrics:
        figures = {"slowest_rank": slowest, "slowest_seconds": own[slowest].item(), "median_seconds": median}
        metrics.write("ranks", run.step, figures)
    if world.size > 1 and own[slowest] > SLOW * median:
        screen.note(
            f"step {run.step}: rank {slowest} is slow: {own[slowest]:.3g} s of its own per step, "
            f"the median rank {median:.3g} s"
        )


def finish(run: Run, screen: Screen, held_out: float | None) -> dict[str, Any]:
    """Export, plot, summarise."""
    cfg, world = run.cfg, run.world
    if cfg.checkpoint.export_hf:
        save_hf(
            run.model,
            hf_map(run.arch),
            cfg.run_dir / "hf",
            config=config_to_hf(run.arch),
            dtype=getattr(torch, cfg.checkpoint.export_dtype),
            tokenizer_dir=cfg.data.tokenizer or cfg.model.path,
        )
    summary = {
        "step": run.step,
        "num_tokens": run.num_tokens,
        "train_seconds": round(run.train_seconds, 2),
        "tokens_per_second": round(run.num_tokens / max(run.train_seconds, 1e-9), 1),
        "validation_loss": held_out,
        "reference_losses": cfg.log.reference_losses,
        "num_skipped": run.num_skipped,
        "peak_memory_gib": round(peak_memory_gib(world.device), 2),
        "ranks": world.size,
        "stopped": False,
    }
    if world.is_main:
        plot_loss(cfg.run_dir / "metrics.jsonl", cfg.run_dir / "loss.png", cfg.log.reference_losses)
        if run.expert_counts is not None:
            _report_experts(run, screen)
        (cfg.run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        screen.summary("Training finished", _summary_rows(summary, cfg))
    world.barrier()
    return summary


def _report_experts(run: Run, screen: Screen) -> None:
    """Leave the load of every expert as numbers and as a picture, and say what the export cannot hold."""
    loads = {"choices_per_expert": run.expert_counts.tolist()}
    (run.cfg.run_dir / "expert_load.json").write_text(json.dumps(loads) + "\n")
    moe_layers = [i for i in range(run.arch.num_hidden_layers) if run.arch.is_moe_layer(i)]
    plot_expert_load(run.expert_counts, moe_layers, run.cfg.run_dir / "expert_load.png")
    has_name = any(name.endswith("choice_bias") for name in hf_map(run.arch))
    if run.cfg.checkpoint.export_hf and run.arch.moe.choice_bias and not has_name:
        screen.note(
            f"hf/ is without the routing bias, for which {run.arch.family} has no name: its routing is that of the "
            "plain scores"
        )


def _summary_rows(summary: dict[str, Any], cfg: TrainConfig) -> dict[str, str]:
    rows = {
        "steps": f"{summary['step']:,}",
        "tokens": f"{summary['num_tokens']:,}",
        "time in steps": format_seconds(summary["train_seconds"]),
        "tokens/s": f"{summary['tokens_per_second']:,.0f} on {summary['ranks']} rank(s)",
        "peak memory": f"{summary['peak_memory_gib']:.2f} GiB on rank 0",
        "skipped steps": str(summary["num_skipped"]),
    }
    held_out = summary["validation_loss"]
    if held_out is not None:
        rows["held-out loss"] = f"{held_out:.4f} nats/token"
        for name, level in summary["reference_losses"].items():
            rows[f"  against {name}"] = f"{level:.4f} nats/token: {100 * (held_out / level - 1):+.1f} %"
    rows["loss curve"] = str(cfg.run_dir / "loss.png")
    if (cfg.run_dir / "expert_load.png").exists():
        rows["expert load"] = str(cfg.run_dir / "expert_load.png")
    if cfg.checkpoint.export_hf:
        rows["Hugging Face"] = str(cfg.run_dir / "hf")
    return rows
