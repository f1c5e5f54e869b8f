import json

import pytest

from xtuner.data import source
from xtuner.data.source import BadLine, ChatSample, TextSample, check_file, read_samples
from xtuner.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def test_text_and_chat_lines_keep_their_line_numbers(write_jsonl):
    path = write_jsonl([{"text": "one"}, "", {"messages": [USER, ANSWER], "id": 7}, "   ", {"text": "two"}])
    first, chat, last = read_samples(path)
    assert first == TextSample(1, "one") and last == TextSample(5, "two")
    assert isinstance(chat, ChatSample) and chat.line == 3
    assert chat.messages == [USER, ANSWER] and chat.loss == [False, True] and not chat.explicit


def test_loss_of_a_message_overrides_the_default(write_jsonl):
    messages = [{**USER, "loss": True}, {**ANSWER, "loss": False}, USER, ANSWER]
    (chat,) = read_samples(write_jsonl([{"messages": messages}]))
    assert chat.loss == [True, False, False, True] and chat.explicit
    assert all("loss" not in message for message in chat.messages)


def test_openai_forms_are_brought_to_what_templates_expect(write_jsonl):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (chat,) = read_samples(write_jsonl([{"messages": messages}]))
    assert chat.messages[0]["content"] == "hi"
    assert chat.messages[1]["content"] == ""
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[1]", "expected a JSON object, found a list"),
        ({"prompt": "a"}, "needs either 'messages' or 'text'; found 'prompt'"),
        ({"text": "a", "messages": []}, "needs either 'messages' or 'text'; found 'text', 'messages'"),
        ({"text": 3}, "text: expected a string, found a number"),
        ({"text": ""}, "text: empty"),
        ('{"text": "\\ud800"}', "text: contains a lone surrogate, which is no character"),
        ({"messages": []}, "messages: expected a list of at least one message, found an empty list"),
        ({"messages": [3]}, "messages[0]: expected an object, found a number"),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role='bot': expected one of system, developer"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content: missing"),
        ({"messages": [{**USER, "content": 1}]}, "messages[0].content: expected a string, found a number"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "messages[0].content[0]: only parts"),
        ({"messages": [{**ANSWER, "loss": 1}]}, "messages[0].loss=1: expected true or false"),
        ({"messages": [{**USER, "tool_calls": []}]}, "messages[0].tool_calls: only an assistant message calls tools"),
        ({"messages": [{**ANSWER, "tool_calls": [{}]}]}, "messages[0].tool_calls[0]: expected"),
        (
            {"messages": [{**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments: not valid JSON",
        ),
        ({"messages": [USER]}, "messages: nothing to learn, no assistant message"),
        ({"messages": [{**ANSWER, "loss": False}]}, "messages: nothing to learn"),
        ({"messages": [ANSWER], "tools": "f"}, "tools: expected a list of objects, found a string"),
    ],
)
def test_malformed_lines_say_why(write_jsonl, line, reason):
    _, bad = read_samples(write_jsonl([{"text": "good"}, line]))
    assert isinstance(bad, BadLine) and bad.line == 2
    assert bad.reason.startswith(reason)


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    assert list(read_samples(path)) == [BadLine(1, "not UTF-8 (invalid start byte at byte 10)")]
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="a.txt: not UTF-8 text"):
        list(read_samples(tmp_path / "a.txt"))


def test_byte_order_mark_is_no_part_of_the_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "x"}).encode())
    assert list(read_samples(path)) == [TextSample(1, "x")]


def test_a_text_file_is_one_document_in_pieces_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "TXT_PIECE_CHARS", 10)
    text = "abc\r\ndefg\n\nlonger than a piece without end\nx\n"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(read_samples(path))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) < 20


def test_an_empty_text_file_holds_no_document(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    assert list(read_samples(tmp_path / "a.txt")) == []


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: no such data file"):
        check_file(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="not a file; name the .jsonl or .txt files themselves"):
        check_file(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match="a.csv: unknown kind of data file '.csv'; expected .jsonl or .txt"):
        check_file(tmp_path / "a.csv")
