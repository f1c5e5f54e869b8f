"""A run small enough to be launched many times: a two-layer MoE on a few kilobytes of made-up text."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ARCH = {
    "family": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def make_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer without merges, in Hugging Face form."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory


def make_texts(path: Path, num_documents: int, seed: int) -> Path:
    rng = random.Random(seed)
    words = "the a router expert token learns sends weighs picks gate with from to many few".split()
    with open(path, "w") as f:
        for _ in range(num_documents):
            f.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(2, 14)))}) + "\n")
    return path


def tiny_config(directory: Path, **fields: object) -> dict:
    """Config of a run in `directory`; makes tokenizer and data there on first use."""
    if not (directory / "train.jsonl").exists():
        make_tokenizer(directory / "tokenizer")
        make_texts(directory / "train.jsonl", 80, seed=1)
        make_texts(directory / "held_out.jsonl", 9, seed=2)
    config = {
        "model": {"arch": ARCH},
        "data": {
            "train": [str(directory / "train.jsonl")],
            "validation": [str(directory / "held_out.jsonl")],
            "tokenizer": str(directory / "tokenizer"),
            "pack_max_length": 96,
            "cache_dir": str(directory / "cache"),
        },
        "run_dir": str(directory / "run"),
        "device": "cpu",
        "num_threads": 1,
        "seed": 2,
        "steps": 20,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "optim": {"lr": 1e-3, "eps": 1e-4},
        "loss": {"aux_loss_coef": 0.01, "z_loss_coef": 0.001},
        "log": {"tensorboard": False},
        "checkpoint": {"export_dtype": "float32"},
    }
    for name, value in fields.items():
        section = config.get(name)
        config[name] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
    return config


def write_config(path: Path, config: dict) -> Path:
    path.write_text(json.dumps(config))
    return path


def command(config_file: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "xtuner.run", "train", str(config_file), *arguments]


def launch(config_file: Path, *arguments: str, cwd: Path, timeout: float = 180) -> subprocess.CompletedProcess:
    """Run the command to its end, in a clean environment of one process."""
    return subprocess.run(
        command(config_file, *arguments), cwd=cwd, env=environment(), timeout=timeout, capture_output=True, text=True
    )


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}


def losses(run_dir: Path, kind: str = "train") -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] == kind]


def exported_weights(run_dir: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(run_dir / "hf" / "model.safetensors")
