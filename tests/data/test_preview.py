import io
import re

import pytest
from rich.console import Console

from xtuner.data import preview
from xtuner.errors import DataError


@pytest.fixture
def printed(tokenizer_dir):
    def run(files, cfg, **kwargs):
        console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system="standard")
        preview(files, cfg, tokenizer_dir, console=console, **kwargs)
        return console.file.getvalue()

    return run


def test_counts_histogram_and_skipped_lines(write_jsonl, texts, cfg, printed):
    path = write_jsonl([*texts(20), "broken", {"text": "alpha " * 100}])
    text = printed([path], cfg.model_copy(update={"on_malformed": "skip", "on_long": "skip"}), num_samples=0)
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    assert plain.startswith("20 documents ")
    assert " 1 malformed lines skipped 1 documents skipped as too long 0 documents truncated " in plain
    assert "of them learned (100.0%)" in plain and "packs of 64 (best_fit)" in plain
    assert "document lengths" in plain and "█" in plain


def test_learned_tokens_are_green_and_the_rest_is_dim(write_jsonl, cfg, printed):
    turns = [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": "beta gamma."}]
    text = printed([write_jsonl([{"messages": turns}])], cfg)
    assert "\x1b[32mbeta gamma.<|im_end|>\x1b[0m" in text
    assert "\x1b[2malpha?<|im_end|>\x1b[0m" in text
    assert "data.jsonl, line 1: " in text


def test_long_samples_are_cut(write_jsonl, cfg, printed):
    text = printed([write_jsonl([{"text": "alpha " * 600}])], cfg.model_copy(update={"packing": "exact"}))
    assert "more tokens" in text


def test_errors_pass_through(tmp_path, cfg, printed):
    with pytest.raises(DataError, match="none.jsonl: no such data file"):
        printed([tmp_path / "none.jsonl"], cfg)
