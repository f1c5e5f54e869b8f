"""Samples from files, one at a time: JSONL lines with `messages` or `text`, and plain .txt files.

Validation happens here, against the OpenAI chat format; what cannot be used becomes a `BadLine`, and the caller decides
whether that stops the run. A file is never in memory whole: a .txt file comes in pieces cut at line ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".txt")
TXT_PIECE_CHARS = 1 << 22


@dataclass(frozen=True)
class TextSample:
    """Plain text, every token of it learned. A long .txt file is several pieces of one document."""

    line: int
    text: str
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class ChatSample:
    """A conversation. `loss[i]` says whether message i is learned; `explicit` whether the file said so anywhere."""

    line: int
    messages: list[dict[str, Any]]
    loss: list[bool]
    tools: list[dict[str, Any]] | None = None
    explicit: bool = False


@dataclass(frozen=True)
class BadLine:
    line: int
    reason: str


Sample = TextSample | ChatSample


def check_file(path: Path) -> None:
    """Raises DataError when `path` is no readable file of a known kind."""
    if not path.exists():
        raise DataError(f"{path}: no such data file")
    if not path.is_file():
        raise DataError(f"{path}: not a file; name the {' or '.join(SUFFIXES)} files themselves")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of data file '{path.suffix}'; expected {' or '.join(SUFFIXES)}")


def read_samples(path: Path) -> Iterator[Sample | BadLine]:
    """Every sample of `path` in file order, with its line number (from 1). Blank lines are not samples."""
    yield from (_read_txt(path) if path.suffix == ".txt" else _read_jsonl(path))


def _read_txt(path: Path) -> Iterator[Sample | BadLine]:
    first = True
    with path.open(encoding="utf-8", newline="") as file:
        try:
            piece = file.read(TXT_PIECE_CHARS)
            while piece:
                following = file.read(TXT_PIECE_CHARS)
                cut = piece.rfind("\n") + 1 if following else len(piece)
                cut = cut or len(piece)
                if piece.strip() or not first:
                    yield TextSample(1, piece[:cut], first=first, last=not following)
                    first = False
                piece = piece[cut:] + following
        except UnicodeDecodeError as e:
            raise DataError(f"{path}: not UTF-8 text ({e})") from None


def _read_jsonl(path: Path) -> Iterator[Sample | BadLine]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield _parse(number, raw)
            except _Malformed as e:
                yield BadLine(number, str(e))


class _Malformed(Exception):
    """Why one line is no sample; never leaves this module."""


def _parse(number: int, raw: bytes) -> Sample:
    try:
        value = json.loads(raw.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as e:
        raise _Malformed(f"not UTF-8 ({e.reason} at byte {e.start})") from None
    except json.JSONDecodeError as e:
        raise _Malformed(f"not valid JSON: {e.msg} at column {e.colno}") from None
    except RecursionError:
        raise _Malformed("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise _Malformed(f"expected a JSON object, found {_kind(value)}")
    if ("messages" in value) == ("text" in value):
        found = ", ".join(map(repr, value)) or "no fields"
        raise _Malformed(f"needs either 'messages' or 'text'; found {found}")
    if "text" in value:
        return TextSample(number, _text(value["text"]))
    return _chat(number, value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Malformed(f"text: expected a string, found {_kind(value)}")
    if not value:
        raise _Malformed("text: empty")
    return _encodable("text", value)


def _encodable(where: str, value: str) -> str:
    """JSON may hold half a surrogate pair, which no tokenizer can encode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Malformed(f"{where}: contains a lone surrogate, which is no character") from None
    return value


def _chat(number: int, value: dict[str, Any]) -> ChatSample:
    raw_messages = value["messages"]
    if not isinstance(raw_messages, list) or not raw_messages:
        raise _Malformed(f"messages: expected a list of at least one message, found {_kind(raw_messages)}")
    tools = value.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _Malformed(f"tools: expected a list of objects, found {_kind(tools)}")
    messages = [_message(f"messages[{i}]", message) for i, message in enumerate(raw_messages)]
    given = [message.pop("loss", None) for message in messages]
    loss = [m["role"] == "assistant" if flag is None else flag for m, flag in zip(messages, given, strict=True)]
    if not any(loss):
        raise _Malformed("messages: nothing to learn, no assistant message (or all have loss=false)")
    return ChatSample(number, messages, loss, tools or None, explicit=any(flag is not None for flag in given))


def _message(where: str, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _Malformed(f"{where}: expected an object, found {_kind(raw)}")
    message = {key: value for key, value in raw.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise _Malformed(f"{where}.role={role!r}: expected one of {', '.join(ROLES)}")
    if not isinstance(message.get("loss", True), bool):
        raise _Malformed(f"{where}.loss={message['loss']!r}: expected true or false")
    if "tool_calls" in message:
        if role != "assistant":
            raise _Malformed(f"{where}.tool_calls: only an assistant message calls tools, not role={role!r}")
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", message["tool_calls"])
    if "content" in message:
        message["content"] = _content(f"{where}.content", message["content"])
    elif message.get("tool_calls"):
        message["content"] = ""  # OpenAI sends null here; most templates need a string
    else:
        raise _Malformed(f"{where}.content: missing")
    return message


def _content(where: str, content: Any) -> str:
    """A string, or OpenAI's list of parts when all of them are text."""
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise _Malformed(f'{where}[{i}]: only parts {{"type": "text", "text": "…"}} are supported')
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _Malformed(f"{where}: expected a string, found {_kind(content)}")
    return _encodable(where, content)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """OpenAI writes a call's arguments as JSON inside a string; templates expect the object itself."""
    if not isinstance(calls, list):
        raise _Malformed(f"{where}: expected a list, found {_kind(calls)}")
    return [_tool_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _Malformed(f'{where}: expected {{"function": {{"name": "…", "arguments": …}}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (json.JSONDecodeError, RecursionError) as e:
            raise _Malformed(f"{where}.function.arguments: not valid JSON: {e}") from None
    if not isinstance(arguments, dict):
        raise _Malformed(f"{where}.function.arguments: expected an object, found {_kind(arguments)}")
    return {**call, "function": {**function, "arguments": arguments}}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    name = names.get(type(value), type(value).__name__)
    return f"an empty {name.split()[-1]}" if value in ([], {}, "") else name
