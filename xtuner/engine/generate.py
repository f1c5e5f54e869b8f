"""Sampling from a Hugging Face directory, batched, with a KV cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from xtuner.checkpoint.hf import load_hf
from xtuner.data import load_tokenizer
from xtuner.models import build_model, config_from_hf, hf_map
from xtuner.nn.kv_cache import KVCache

Messages = list[dict]


class Generator:
    """A model and its tokenizer, ready to continue texts or answer chats.

    Args:
        path: Hugging Face directory with config.json, weights and tokenizer.
        dtype: "float32" or "bfloat16".

    Raises:
        CheckpointError, ConfigError, DataError: what is wrong with the directory.
    """

    def __init__(self, path: Path | str, dtype: str = "float32", device: str = "cpu"):
        self.cfg = config_from_hf(path)
        self.model = build_model(self.cfg, "meta").to(getattr(torch, dtype)).to_empty(device=device).eval()
        load_hf(self.model, hf_map(self.cfg), path)
        self.tokenizer = load_tokenizer(Path(path))
        self.dtype, self.device = getattr(torch, dtype), device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str | Messages],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str]:
        """Continue each prompt (text) or answer it (messages, through the chat template).

        Args:
            temperature: 0 always takes the likeliest token.
            top_p: sample from the smallest set of tokens with at least this probability.
            top_k: sample from this many likeliest tokens; 0 for all.

        Returns:
            The new text of each prompt, without the end token.
        """
        sequences = [self._encode(p) for p in prompts]
        new_ids = self.generate_ids(sequences, max_new_tokens, temperature, top_p, top_k, seed)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new_ids]

    @torch.no_grad()
    def generate_ids(
        self,
        sequences: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Token ids in, new token ids out; a sequence ends before its end-of-text token."""
        random = torch.Generator(self.device).manual_seed(seed)
        longest = max(map(len, sequences)) + max_new_tokens
        cache = KVCache(
            self.cfg.num_hidden_layers, len(sequences), longest, self.cfg.num_key_value_heads, self.cfg.head_dim,
            self.dtype, self.device,
        )  # fmt: skip
        ends = self._end_tokens()
        outputs: list[list[int]] = [[] for _ in sequences]
        running, fresh = set(range(len(sequences))), [list(s) for s in sequences]
        for _ in range(max_new_tokens):
            logits = self._step(fresh, cache)
            chosen = sample(logits.float(), temperature, top_p, top_k, random).tolist()
            # A finished sequence goes on computing beside the others; its tokens are thrown away.
            for s in sorted(running):
                if chosen[s] in ends:
                    running.discard(s)
                else:
                    outputs[s].append(chosen[s])
            if not running:
                break
            fresh = [[token] for token in chosen]
        return outputs

    def _step(self, fresh: list[list[int]], cache: KVCache) -> Tensor:
        """Logits [S, V] that follow the last of each sequence's new tokens."""
        lengths = torch.tensor([len(f) for f in fresh])
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(self.device, torch.int32)
        starts = cache.lengths
        positions = [start + i for start, f in zip(starts, fresh, strict=True) for i in range(len(f))]
        output = self.model(
            torch.tensor([t for f in fresh for t in f], device=self.device),
            torch.tensor([positions], device=self.device),
            cu_seqlens,
            int(lengths.max()),
            cache=cache,
        )
        return output.logits[cu_seqlens[1:].long() - 1]

    def _encode(self, prompt: str | Messages) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt, add_special_tokens=True)["input_ids"]
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _end_tokens(self) -> set[int]:
        ends = self.cfg.eos_token_id if self.cfg.eos_token_id is not None else self.tokenizer.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, random: torch.Generator) -> Tensor:
    """One token int64 [S] per row of logits float32 [S, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_k:
        probs = probs.masked_fill(probs < probs.topk(min(top_k, probs.shape[-1])).values[:, -1:], 0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        probs = torch.zeros_like(probs).scatter(1, order, ordered.masked_fill(before >= top_p, 0))
    return torch.multinomial(probs, 1, generator=random)[:, 0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="Hugging Face directory")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def main(args: argparse.Namespace) -> None:
    prompts = [[{"role": "user", "content": p}] for p in args.prompt] if args.chat else args.prompt
    generator = Generator(args.path, args.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    texts = generator.generate(
        prompts, args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed
    )
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}\n{text}\n" if args.chat else f"{prompt}{text}\n")
