"""One long document through a mixture of experts, a whole training step on one processor rank, in bounded memory.

    python bench/long_document.py                          65,536 tokens, logits in parts, blocks recomputed: minutes
    python bench/long_document.py --tokens 16384 --apart   also what each technique saves by itself

Each trial is a process of its own, which takes a short step first, so that there is optimizer state. Its figures are
its peak resident memory, how much of that the long step adds to what was held before it, and what tensors held at the
peak, on the device and on the host; a technique's saving is the difference to the trial above. On a processor device
and host are the same memory: what goes to the host is resident as before, and its saving is one of tensors only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# More than 50 million parameters, 4 layers, 32k vocabulary.
ARCH = {
    "family": "qwen3_moe", "vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 65536,
    "moe": {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 384},
}  # fmt: skip
TRIALS = {
    "nothing (logits whole)": ({"checkpointing": "none"}, False),
    "logits in parts": ({"checkpointing": "none"}, True),
    "+ selective": ({"checkpointing": "selective"}, True),
    "+ half of the blocks": ({"checkpointing": "full", "checkpointing_ratio": 0.5}, True),
    "+ full": ({"checkpointing": "full"}, True),
    "+ inputs on the host": ({"checkpointing": "full", "offload_activations": True}, True),
    "+ optimizer on the host": (
        {"checkpointing": "full", "offload_activations": True, "offload_optimizer": True}, True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--apart", action="store_true", help="also without some or all techniques")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        print(json.dumps(_trial(args.trial, args.tokens, args.threads)))
        return
    names = list(TRIALS) if args.apart else ["+ selective"]
    results, before = {}, None
    print(f"{args.tokens:,} tokens as one document, {args.threads} threads")
    for name in names:
        command = [sys.executable, __file__, "--trial", name]
        command += ["--tokens", str(args.tokens), "--threads", str(args.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = results[name] = json.loads(done.stdout)
        shown = {key: f"{result[key] / 2**30:6.2f} GiB" for key in ("peak", "peak_growth", "device", "host")}
        saved = ""
        if before is not None:
            saved = "  saves " + ", ".join(
                f"{(before[key] - result[key]) / 2**30:6.2f} GiB {what}"
                for key, what in (("peak_growth", "resident"), ("device", "of the device's"))
            )
        before = result
        print(f"{name:24} peak {shown['peak']}, in the step {shown['peak_growth']}; device {shown['device']}, host "
              f"{shown['host']}; {result['seconds']:6.1f} s, loss {result['loss']:.4f}{saved}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"tokens": args.tokens, "arch": ARCH, "trials": results}, indent=1) + "\n")


def _trial(name: str, tokens: int, threads: int) -> dict:
    import torch

    from xtuner import _C
    from xtuner.batch import Batch
    from xtuner.config import LossConfig, MemoryConfig, ModelConfig, OptimConfig
    from xtuner.engine.train_step import train_step
    from xtuner.models import build_model
    from xtuner.optim import build_adamw, keep_state_on_host
    from xtuner.parallel import World
    from xtuner.parallel.recompute import recompute_blocks
    from xtuner.plan.tracker import MemoryTracker, Usage

    memory, in_parts = TRIALS[name]
    torch.set_num_threads(threads)
    _C.keep_freed_memory()
    model = build_model(ModelConfig.parse(ARCH))
    if not in_parts:
        from xtuner import ops

        ops.linear_cross_entropy = _whole_logits
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters >= 50e6, parameters
    model.init_weights(0)
    cfg = MemoryConfig(**memory)
    recompute_blocks(model, cfg)
    optimizer = build_adamw(model, OptimConfig())
    if cfg.offload_optimizer:
        keep_state_on_host(optimizer)
    world, tracker = World(0, 0, 1, 1, torch.device("cpu")), MemoryTracker(block=1)

    def step(length: int) -> float:
        ids = torch.randint(ARCH["vocab_size"], (length,), generator=torch.Generator().manual_seed(0))
        batch = Batch(
            input_ids=ids, labels=ids.roll(-1), loss_weights=torch.ones(length), positions=torch.arange(length)[None],
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32), max_seqlen=length,
        )  # fmt: skip
        return train_step(model, optimizer, [batch], LossConfig(), 1.0, world).loss

    tracker.label_model(model)
    with tracker:
        step(64)
        tracker.peak, tracker.host_peak = Usage(), 0
        before, started = _resident("VmRSS"), time.perf_counter()
        loss = step(tokens)
    peak = _resident("VmHWM")
    return {"peak": peak, "peak_growth": peak - before, "device": tracker.peak.device, "host": tracker.host_peak,
            "seconds": time.perf_counter() - started, "loss": loss, "parameters": parameters}  # fmt: skip


def _whole_logits(hidden, weight, labels, loss_weights):
    import torch.nn.functional as F

    return (F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none") * loss_weights).sum()


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
