import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from xtuner.data import cache
from xtuner.data.cache import open_token_file
from xtuner.errors import DataError


@pytest.fixture
def source(write_jsonl, texts):
    return write_jsonl(texts(30))


@pytest.fixture
def encoders(monkeypatch):
    """Counts how often something was really tokenised."""
    made = []
    original = cache.Encoder
    monkeypatch.setattr(cache, "Encoder", lambda *args: made.append(args) or original(*args))
    return made


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in cache.ARRAYS)


def test_tokens_are_those_of_the_tokenizer(source, cfg, tokenizer_dir, texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    file = open_token_file(source, cfg, tokenizer_dir)
    assert (file.ids.dtype, file.mask.dtype, file.offsets.dtype) == (np.int32, np.uint8, np.int64)
    assert file.num_documents == 30 and file.lines.tolist() == list(range(1, 31))
    assert file.offsets[0] == 0 and file.offsets[-1] == file.num_tokens == len(file.mask)
    for i, sample in enumerate(texts(30)):
        ids = file.ids[file.offsets[i] : file.offsets[i + 1]].tolist()
        assert ids == [*tokenizer.encode(sample["text"]), tokenizer.eos_token_id]
    assert file.mask.all()


def test_a_tokenizers_leading_special_token_begins_every_text(source, cfg, make_tokenizer):
    from transformers import AutoTokenizer

    directory = make_tokenizer(bos_token="<s>")
    state = (directory / "tokenizer.json").read_text()
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(state)
    start = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    backend.save(str(directory / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(directory).encode("mu")[0] == start[1]
    file = open_token_file(source, cfg, directory)
    assert (file.ids[file.offsets[:-1]] == start[1]).all() and (file.ids == start[1]).sum() == 30


def test_a_long_text_file_is_one_document(tmp_path, cfg, tokenizer_dir, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {i} alpha beta\n" for i in range(200)))
    whole = open_token_file(path, cfg, tokenizer_dir)
    monkeypatch.setattr("xtuner.data.source.TXT_PIECE_CHARS", 500)
    pieces = open_token_file(path, cfg.model_copy(update={"cache_dir": tmp_path / "other"}), tokenizer_dir)
    assert whole.num_documents == 1 and same(whole, pieces)


def test_a_second_opening_reads_the_cache(source, cfg, tokenizer_dir, encoders):
    first = open_token_file(source, cfg, tokenizer_dir)
    second = open_token_file(source, cfg, tokenizer_dir)
    assert len(encoders) == 1 and same(first, second)
    assert isinstance(second.ids, np.memmap)


def test_packing_settings_and_the_files_name_do_not_tokenise_again(source, cfg, tokenizer_dir, encoders, tmp_path):
    open_token_file(source, cfg, tokenizer_dir)
    copy = shutil.copy(source, tmp_path / "copy.jsonl")
    other = cfg.model_copy(update={"pack_max_length": 7, "packing": "exact", "on_long": "skip", "shuffle": False})
    open_token_file(tmp_path / "copy.jsonl", other, tokenizer_dir)
    assert copy and len(encoders) == 1


def test_content_tokenizer_and_template_each_count(source, cfg, tokenizer_dir, make_tokenizer, encoders, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    open_token_file(source, cfg, tokenizer_dir)
    open_token_file(source, cfg.model_copy(update={"chat_template": template}), tokenizer_dir)
    open_token_file(source, cfg.model_copy(update={"use_chatml": False}), tokenizer_dir)
    open_token_file(source, cfg, make_tokenizer(pad_token="<s>"))
    source.write_text(source.read_text().replace("alpha", "omega"))
    open_token_file(source, cfg, tokenizer_dir)
    assert len(encoders) == 5


def shorten(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


ARRAY_FILES = [f"{name}.bin" for name in cache.ARRAYS]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ARRAY_FILES for damage in (shorten, flip, os.remove)]
    + [("meta.json", shorten), ("meta.json", os.remove)],
)
def test_a_damaged_cache_is_noticed_and_built_again(source, cfg, tokenizer_dir, encoders, caplog, name, damage):
    good = open_token_file(source, cfg, tokenizer_dir)
    expected = [np.array(getattr(good, field)) for field in cache.ARRAYS]
    (place,) = (path for path in cfg.cache_dir.iterdir() if path.is_dir())
    damage(place / name)
    repaired = open_token_file(source, cfg, tokenizer_dir)
    assert len(encoders) == 2 and "tokenising again" in caplog.text
    assert all(np.array_equal(getattr(repaired, f), e) for f, e in zip(cache.ARRAYS, expected, strict=True))
    open_token_file(source, cfg, tokenizer_dir)
    assert len(encoders) == 2


def test_an_interrupted_build_leaves_nothing_that_counts(source, cfg, tokenizer_dir):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from xtuner.config import DataConfig\n"
        "from xtuner.data import cache\n"
        "cache.Path.write_text = lambda *args: os._exit(9)\n"  # dies just before meta.json
        "cfg = DataConfig(use_chatml=True, cache_dir=Path(sys.argv[2]))\n"
        "cache.open_token_file(Path(sys.argv[1]), cfg, Path(sys.argv[3]))\n"
    )
    command = [sys.executable, "-c", program, str(source), str(cfg.cache_dir), str(tokenizer_dir)]
    assert subprocess.run(command, timeout=120).returncode == 9
    leftovers = list(cfg.cache_dir.glob(".*"))
    assert len(leftovers) == 1
    assert open_token_file(source, cfg, tokenizer_dir).num_documents == 30
    assert not list(cfg.cache_dir.glob(".*"))


def _race(barrier, queue, source, cfg, tokenizer_dir):
    original = cache._build
    built = []
    cache._build = lambda *args: built.append(1) or original(*args)
    barrier.wait()
    file = open_token_file(source, cfg, tokenizer_dir)
    queue.put((len(built), file.num_tokens))


def test_of_two_processes_one_tokenises_and_both_get_the_result(source, cfg, tokenizer_dir):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    args = (barrier, queue, source, cfg, tokenizer_dir)
    processes = [context.Process(target=_race, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sum(built for built, _ in results) == 1
    assert results[0][1] == results[1][1] == open_token_file(source, cfg, tokenizer_dir).num_tokens


def test_malformed_lines_stop_or_are_counted(write_jsonl, cfg, tokenizer_dir, encoders):
    path = write_jsonl([{"text": "a"}, {"text": 1}, "nope", {"text": "b"}])
    expected = r"data.jsonl, line 2: text: expected a string, found a number \(data.on_malformed=skip leaves"
    with pytest.raises(DataError, match=expected):
        open_token_file(path, cfg, tokenizer_dir)
    file = open_token_file(path, cfg.model_copy(update={"on_malformed": "skip"}), tokenizer_dir)
    assert file.num_documents == 2 and file.num_malformed == 2 and file.lines.tolist() == [1, 4]
    with pytest.raises(DataError, match=expected):  # the cache of the lenient run does not soften the strict one
        open_token_file(path, cfg, tokenizer_dir)
    assert len(encoders) == 2


def test_a_file_that_changes_while_it_is_read(source, cfg, tokenizer_dir, monkeypatch):
    original = cache._write

    def grow(*args):
        source.write_text(source.read_text() * 2)
        return original(*args)

    monkeypatch.setattr(cache, "_write", grow)
    with pytest.raises(DataError, match="data.jsonl: changed while it was being tokenised"):
        open_token_file(source, cfg, tokenizer_dir)


def test_unusable_tokenizers(source, cfg, tmp_path, make_tokenizer):
    with pytest.raises(DataError, match="tokenizer=.*nowhere: no such directory"):
        open_token_file(source, cfg, tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer=.*broken: cannot be loaded"):
        open_token_file(source, cfg, broken)
    with pytest.raises(DataError, match="has no eos_token, which must end every document"):
        open_token_file(source, cfg, make_tokenizer(eos_token=None))


def test_missing_template_file(source, cfg, tokenizer_dir, tmp_path):
    with pytest.raises(DataError, match="data.chat_template=.*none.jinja: no such file"):
        open_token_file(source, cfg.model_copy(update={"chat_template": tmp_path / "none.jinja"}), tokenizer_dir)


def test_a_cached_file_is_opened_without_importing_transformers(source, cfg, tokenizer_dir):
    open_token_file(source, cfg, tokenizer_dir)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from xtuner.config import DataConfig\n"
        "from xtuner.data import build_dataset\n"
        "cfg = DataConfig(use_chatml=True, cache_dir=Path(sys.argv[2]))\n"
        "assert build_dataset([Path(sys.argv[1])], cfg, sys.argv[3]).num_documents == 30\n"
        "assert not {'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(source), str(cfg.cache_dir), str(tokenizer_dir)]
    subprocess.run(command, check=True, timeout=120)
