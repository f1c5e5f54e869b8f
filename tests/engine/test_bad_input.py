"""What a user can get wrong ends in one clear line and exit code 2, not in a traceback."""

import json

import pytest

from tests.engine.tiny import ARCH, make_tokenizer, tiny_config, write_config
from xtuner import run


@pytest.fixture
def fail(tmp_path, capsys):
    """Runs a config that must fail; returns the message."""

    def call(*arguments, **fields):
        config_file = write_config(tmp_path / "run.json", tiny_config(tmp_path, **fields))
        assert run.main(["train", str(config_file), *arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "Traceback" not in message
        return message

    return call


def test_unknown_field(fail):
    assert "optim.lrr: unknown field; the nearest valid field is optim.lr" in fail("optim.lrr=1")


def test_missing_data_file(fail, tmp_path):
    assert "absent.jsonl" in fail(data={"train": [str(tmp_path / "absent.jsonl")]})


def test_malformed_line_is_named_or_skipped(fail, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n{"text": "also fine"}\n')
    assert "broken.jsonl, line 2" in fail(data={"train": [str(broken)]})


def test_empty_data(fail, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: empty" in fail(data={"train": [str(tmp_path / "empty.jsonl")]})


def test_sample_longer_than_the_pack(fail, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "word " * 50}) + "\n")
    message = fail(data={"train": [str(long)]})
    assert "long.jsonl, line 1" in message and "exceeds data.pack_max_length=96" in message


def test_tokenizer_without_chat_template(fail, tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    assert "use_chatml" in fail(data={"train": [str(chat)]})


def test_tokenizer_of_another_model(fail):
    arch = ARCH | {"vocab_size": 40}
    message = fail(model={"arch": arch})
    assert "is outside the model's vocab_size=40: data.tokenizer=" in message


def test_batch_that_does_not_divide(fail):
    message = fail(global_batch_size=4, micro_batch_size=3)
    assert "global_batch_size=4" in message and "micro_batch_size=3" in message


def test_unknown_model_name(fail):
    assert "model.name=qwen9 is no built-in size; there are " in fail(model={"arch": None, "name": "qwen9"})


def test_cuda_where_there_is_none(fail):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "device=cuda: torch sees no CUDA device" in fail(device="cuda")


def test_hugging_face_directory_without_weights(fail, tmp_path):
    from xtuner.models import SIZES, config_to_hf

    directory = make_tokenizer(tmp_path / "hf")
    (directory / "config.json").write_text(json.dumps(config_to_hf(SIZES["llama-tiny"])))
    message = fail(model={"arch": None, "path": str(directory)})
    assert "holds neither model.safetensors nor model.safetensors.index.json" in message


def test_resume_with_another_model(fail, tmp_path, capsys):
    good = write_config(tmp_path / "good.json", tiny_config(tmp_path, steps=1))
    assert run.main(["train", str(good)]) == 0
    capsys.readouterr()
    message = fail("--resume", "auto", steps=2, model={"arch": ARCH | {"rms_norm_eps": 1e-5}})
    assert "checkpoint of another model: rms_norm_eps=1e-06 (this run: 1e-05)" in message


def test_commands_that_explain(tmp_path, capsys):
    config_file = write_config(tmp_path / "run.json", tiny_config(tmp_path))
    assert run.main(["train", "--help", str(config_file)]) == 0
    fields = capsys.readouterr().out
    assert "optim.weight_decay" in fields and "float" in fields and "decoupled decay of matrices" in fields
    assert run.main(["info"]) == 0
    assert "instruction set" in capsys.readouterr().out


def test_data_command_and_convert(tmp_path, capsys):
    tiny = tiny_config(tmp_path, steps=2)
    assert run.main(["train", str(write_config(tmp_path / "run.json", tiny))]) == 0
    assert run.main(["data", tiny["data"]["train"][0], "--tokenizer", tiny["data"]["tokenizer"]]) == 0
    assert "tokens" in capsys.readouterr().out
    assert run.main(["convert", tiny["run_dir"], str(tmp_path / "out"), "--dtype", "float32"]) == 0
    from safetensors.torch import load_file

    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "run/hf/model.safetensors")
    assert ours.keys() == theirs.keys() and all((ours[n] == theirs[n]).all() for n in ours)
