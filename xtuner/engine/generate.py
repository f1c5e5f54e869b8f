"""Sampling from a Hugging Face directory, batched, with a KV cache."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from xtuner.checkpoint.hf import load_hf
from xtuner.data import load_tokenizer
from xtuner.errors import CheckpointError, ConfigError, DataError
from xtuner.models import build_model, config_from_hf, hf_map
from xtuner.nn.kv_cache import KVCache

Messages = list[dict]


class Generator:
    """A model and its tokenizer, ready to continue texts or answer chats.

    Args:
        path: Hugging Face directory with config.json, weights and tokenizer.
        dtype: of weights, activations and cache: "float32" or "bfloat16".
        device: where to compute.

    Raises:
        CheckpointError, ConfigError, DataError: what is wrong with the directory.
    """

    def __init__(self, path: Path | str, dtype: str = "float32", device: str = "cpu"):
        self.path, self.device = Path(path), device
        self.cfg = config_from_hf(self.path)
        self.tokenizer = load_tokenizer(self.path)
        self.end_tokens = _end_tokens(self.path, self.cfg.eos_token_id, self.tokenizer.eos_token_id)
        self.dtype = getattr(torch, dtype)
        self.model = build_model(self.cfg, "meta").to(self.dtype).to_empty(device=device).eval()
        load_hf(self.model, hf_map(self.cfg), self.path)

    def generate(
        self,
        prompts: Sequence[str | Messages],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str]:
        """Continue each prompt (text) or answer it (messages, through the tokenizer's chat template).

        Args:
            max_new_tokens: upper bound of each answer; it ends earlier at an end token.
            temperature: 0 always takes the likeliest token.
            top_p: sample from the smallest set of likeliest tokens with at least this probability.
            top_k: sample from this many likeliest tokens; 0: from all.
            seed: prompt i draws what it would draw alone with seed + i.

        Returns:
            The new text of each prompt, without special tokens.

        Raises:
            ConfigError: an argument out of its range, or a prompt too long for the model.
            DataError: an empty prompt, or messages without a chat template.
        """
        sequences = [self._encode(prompt, i) for i, prompt in enumerate(prompts)]
        new_ids = self.generate_ids(sequences, max_new_tokens, temperature, top_p, top_k, seed)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new_ids]

    @torch.inference_mode()
    def generate_ids(
        self,
        sequences: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[list[int]]:
        """As `generate`, from token ids to the new token ids, which end before the end token."""
        _check_sampling(max_new_tokens, temperature, top_p, top_k)
        outputs: list[list[int]] = [[] for _ in sequences]
        if not sequences:
            return outputs
        cache = self._new_cache(sequences, max_new_tokens)
        draws = [torch.Generator().manual_seed(seed + i) for i in range(len(sequences))]
        # Tokens not yet in the cache: first the prompts, then one per step, none for a sequence that has ended.
        fresh = [list(ids) for ids in sequences]
        running = list(range(len(sequences)))
        for _ in range(max_new_tokens):
            logits_SV = self._step(fresh, cache)
            probs_SV = None if temperature == 0 else sampling_distribution(logits_SV, temperature, top_p, top_k)
            likeliest_S = logits_SV.argmax(-1).tolist()
            fresh = [[] for _ in sequences]
            for row, i in enumerate(running):
                token = likeliest_S[row] if probs_SV is None else _draw(probs_SV[row], draws[i])
                if token not in self.end_tokens:
                    outputs[i].append(token)
                    fresh[i] = [token]
            running = [i for i in running if fresh[i]]
            if not running:
                break
        return outputs

    def _new_cache(self, sequences: Sequence[list[int]], max_new_tokens: int) -> KVCache:
        longest = max(len(ids) for ids in sequences) + max_new_tokens
        if longest > self.cfg.max_position_embeddings:
            raise ConfigError(
                f"max_new_tokens={max_new_tokens}: the longest prompt would grow to {longest} tokens, "
                f"but the model was made for {self.cfg.max_position_embeddings}"
            )
        return KVCache(self.cfg, len(sequences), longest, self.dtype, self.device)

    def _step(self, fresh: list[list[int]], cache: KVCache) -> Tensor:
        """Run the fresh tokens; logits [S, V] after the last of them, a row per sequence that has any. Float32, CPU."""
        lengths = [len(ids) for ids in fresh]
        bounds = [0, *accumulate(lengths)]
        positions = [seen + n for seen, ids in zip(cache.lengths, fresh, strict=True) for n in range(len(ids))]
        last = [end - 1 for end, length in zip(bounds[1:], lengths, strict=True) if length]
        output = self.model(
            torch.tensor([token for ids in fresh for token in ids], device=self.device),
            torch.tensor([positions], device=self.device),
            torch.tensor(bounds, dtype=torch.int32, device=self.device),
            max(lengths),
            cache=cache,
            logit_rows=torch.tensor(last, device=self.device),
        )
        return output.logits.float().cpu()

    def _encode(self, prompt: str | Messages, number: int) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise DataError(f"{self.path}: the tokenizer has no chat template, which messages need; use plain text")
        else:
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"prompt {number}: empty, so there is nothing to continue")
        return ids


def sampling_distribution(logits_SV: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Probabilities [S, V] after temperature, then top-k, then nucleus (Holtzman et al. 2020, top_p) filtering."""
    logits_SV = logits_SV / temperature
    if 0 < top_k < logits_SV.shape[-1]:
        smallest_kept = logits_SV.topk(top_k).values[:, -1:]
        logits_SV = logits_SV.masked_fill(logits_SV < smallest_kept, float("-inf"))
    probs_SV = logits_SV.softmax(-1)
    if top_p < 1:
        ordered, order = probs_SV.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        probs_SV = torch.zeros_like(probs_SV).scatter(-1, order, ordered.masked_fill(before >= top_p, 0))
        probs_SV = probs_SV / probs_SV.sum(-1, keepdim=True)
    return probs_SV


def _draw(probs_V: Tensor, random: torch.Generator) -> int:
    return int(torch.multinomial(probs_V, 1, generator=random))


def _check_sampling(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if temperature < 0:
        raise ConfigError(f"temperature={temperature}: must be at least 0 (0: always the likeliest token)")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: must be above 0 and at most 1 (1: sample from all tokens)")
    if top_k < 0:
        raise ConfigError(f"top_k={top_k}: must be at least 0 (0: sample from all tokens)")


def _end_tokens(path: Path, *fallbacks: int | list[int] | None) -> set[int]:
    """Ids that end an answer: those of generation_config.json, else of config.json, else the tokenizer's."""
    file = path / "generation_config.json"
    try:
        stated = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    except (ValueError, AttributeError) as e:
        raise CheckpointError(f"{file}: truncated or malformed JSON ({e})") from None
    ends = next((ids for ids in (stated, *fallbacks) if ids is not None), [])
    return set(ends) if isinstance(ends, list) else {ends}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR", help="Hugging Face directory, of a run or from elsewhere")
    parser.add_argument("--prompt", action="append", required=True, help="text; repeat for a batch")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message to answer")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest continuation, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest, up to this probability")
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")


def main(args: argparse.Namespace) -> int:
    """The `generate` command: print every prompt with what follows it."""
    prompts = [[{"role": "user", "content": text}] for text in args.prompt] if args.chat else args.prompt
    generator = Generator(args.path, args.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    texts = generator.generate(prompts, args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}\n{text}\n" if args.chat else f"{prompt}{text}\n")
    return 0
