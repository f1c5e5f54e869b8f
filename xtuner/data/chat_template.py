"""From a conversation to one string and the spans of it that are learned.

The string is what `tokenizer.apply_chat_template(messages, tokenize=False)` gives, so training sees what inference
sends. A learned span covers what the model must write itself: everything after the generation prompt up to and
including the end-of-turn token. Spans are found by rendering, never by guessing at markers:

1. The template has `{% generation %}` marks, and no message overrides its `loss`: the marks are the spans.
2. The conversation up to message i plus generation prompt, and up to message i inclusive, are prefixes of the whole:
   their lengths are the span.
3. The template treats the last turn differently (Qwen3 drops earlier reasoning), so a prefix fails: message i is
   rendered with a placeholder for content, and what stands before and after it must frame the original.

Where none of these holds, no exact mask exists and the sample is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtuner.data.source import ChatSample
from xtuner.errors import DataError

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Functions you may call, as JSON inside <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
{{- '\\n</tools>\\nTo call one, write {"name": <name>, "arguments": <object>} inside <tool_call></tool_call>.' }}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}{{- '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": ' }}{{- call.function.name | tojson }}{{- ', "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PLACEHOLDER = "\u2402xtuner\u2403"
Span = tuple[int, int]


class TemplateMismatch(Exception):
    """Why a conversation does not fit the template; the caller adds file and line."""


def template_text(chat_template: Path | None) -> str | None:
    """The user's own template file. Raises DataError when it cannot be read."""
    if chat_template is None:
        return None
    if not chat_template.is_file():
        raise DataError(f"data.chat_template={chat_template}: no such file")
    return chat_template.read_text(encoding="utf-8")


class ChatTemplate:
    """A tokenizer's rendering of conversations.

    tokenizer: a transformers tokenizer; source: a template that replaces the tokenizer's own; use_chatml: the built-in
    template when there is neither. Raises DataError when there is no template, or ChatML meets a tokenizer without its
    tokens.
    """

    def __init__(self, tokenizer: Any, source: str | None = None, use_chatml: bool = False):
        name = tokenizer.name_or_path
        if source is None and tokenizer.chat_template is None:
            if not use_chatml:
                raise DataError(
                    f"the tokenizer in {name} has no chat template, which data with 'messages' needs: "
                    "set data.chat_template to a Jinja file, or data.use_chatml=true for ChatML"
                )
            missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
            if missing:
                raise DataError(
                    f"data.use_chatml=true: the tokenizer in {name} lacks the tokens {' and '.join(missing)}; "
                    "set data.chat_template to a Jinja file made for it"
                )
            source = CHATML
        self._tokenizer = tokenizer
        self._source = source

    def render(self, sample: ChatSample) -> tuple[str, list[Span]]:
        """The whole conversation and its learned spans [start, end) in characters, in order.

        Raises TemplateMismatch when the template refuses the conversation or leaves no exact mask.
        """
        source = self._source_for(sample.tools)
        messages = _known_roles(sample.messages, source)
        full = self._apply(messages, sample.tools, source)
        if not sample.explicit and re.search(r"\{%-?\s*generation\s*-?%\}", source):
            return full, self._marked_spans(messages, sample.tools, source, full)
        learned = [i for i, flag in enumerate(sample.loss) if flag]
        return full, [self._span(i, messages, sample.tools, source, full) for i in learned]

    def _source_for(self, tools: list | None) -> str:
        """Some tokenizers carry one template for plain chat and another for tool use."""
        return self._tokenizer.get_chat_template(self._source, tools)

    def _apply(self, messages: list[dict], tools: list | None, source: str, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as e:
            raise TemplateMismatch(f"the chat template refuses these messages: {e}") from None

    def _marked_spans(self, messages: list[dict], tools: list | None, source: str, full: str) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )  # fmt: skip
        if rendered[0] != full:
            raise TemplateMismatch("the chat template renders differently when its {% generation %} marks are read")
        return [(start, end) for start, end in spans[0] if start < end]

    def _span(self, i: int, messages: list[dict], tools: list | None, source: str, full: str) -> Span:
        """Where message i is learned; the end may include what follows the end-of-turn token (`learned_tokens`)."""
        if messages[i]["role"] != "assistant":  # no generation prompt leads to it
            return self._framed(i, messages, tools, source, full)
        start = end = None
        if i > 0:
            prompt = self._apply(messages[:i], tools, source, prompt=True)
            start = len(prompt) if full.startswith(prompt) else None
        if i + 1 == len(messages):
            end = len(full)
        else:
            until = self._apply(messages[: i + 1], tools, source)
            end = len(until) if full.startswith(until) else None
        if start is None or end is None:
            framed = self._framed(i, messages, tools, source, full)
            start, end = framed[0] if start is None else start, framed[1] if end is None else end
        if not start <= end:
            raise TemplateMismatch(f"messages[{i}]: the chat template hides where the message begins and ends")
        return start, end

    def _framed(self, i: int, messages: list[dict], tools: list | None, source: str, full: str) -> Span:
        """The span between what stands before and after a placeholder, plus the end-of-turn token."""
        stand_in = {"role": messages[i]["role"], "content": PLACEHOLDER}
        if messages[i]["role"] == "tool":
            stand_in = {**messages[i], "content": PLACEHOLDER}
        before, *after = self._apply([*messages[:i], stand_in, *messages[i + 1 :]], tools, source).split(PLACEHOLDER)
        if len(after) != 1 or not full.startswith(before) or not full.endswith(after[0]):
            raise TemplateMismatch(
                f"messages[{i}]: the chat template renders this message differently depending on what follows, so "
                "there is no exact loss mask; use a template with {% generation %} marks, or set data.chat_template"
            )
        end_of_turn = self._end_of_turn(after[0])
        if len(before) + len(after[0]) > len(full) or (messages[i]["role"] == "assistant" and not end_of_turn):
            raise TemplateMismatch(f"messages[{i}]: the chat template hides where the message begins and ends")
        return len(before), len(full) - len(after[0]) + end_of_turn

    def _end_of_turn(self, text: str) -> int:
        """Length of the special token that `text` begins with, or 0."""
        special = self._tokenizer.all_special_tokens
        added = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        return max((len(token) for token in {*special, *added} if token and text.startswith(token)), default=0)


def _known_roles(messages: list[dict], source: str) -> list[dict]:
    """`developer` is OpenAI's later name of `system`; a template that has never heard of it would drop the message."""
    if "developer" in source:
        return messages
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


def learned_tokens(
    spans: list[Span], offsets: Sequence[Span], is_special: Sequence[bool], text: str
) -> list[tuple[int, int]]:
    """Token ranges [first, last) of the character spans.

    offsets: character range of each token; is_special: whether a token is a special one. A token is learned when it
    holds any character of a span, so one that joins the prompt's last character to the answer's first is.
    White space after the last special token of a span (ChatML's newline after <|im_end|>) belongs to the template:
    generation has ended by then, and it is not learned.
    """
    ranges, token = [], 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < end:
            token += 1
        last = token
        while last > first and not is_special[last - 1]:
            last -= 1
        ends_with_special = last > first and not text[offsets[last - 1][1] : end].strip()
        ranges.append((first, last if ends_with_special else token))
    return ranges
