"""Chat templates: the bytes of transformers, and nothing of Python, of endless work, or of gigabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmo.errors import InputError, ModelError, TooLargeError
from llmo.tasks.template import DEFAULT, ChatTemplate
from support.tiny_chat import tiny_chat_model

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = """{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) ~ '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last='') %}
{% macro turn(role, body) %}<|im_start|>{{ role | trim }}
{{ body }}<|im_end|>
{% endmacro %}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'system', 'tool'] %}{% continue %}{% endif %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {{- turn('assistant', message.tool_calls | map(attribute='function') | map('tojson') | join(', ')) }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
    {% else %}
        {{- turn(message.role, message.content.replace('\\r', '').split('</think>')[-1].strip()) }}
    {%- endif %}
    {%- set ns.last = message.role %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if think %}<think>{% endif %}{% endif %}
"""
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <&>"}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b> 'quoted' 👍🏽"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\n\nb "}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": " y\n"}, {"role": "user", "content": "z"}],
    [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "because"}],
]
SPECS = [
    None,
    [{"type": "function", "function": {"name": "weather", "description": "Wétter", "parameters": {"a": [1, None]}}}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.mark.parametrize("source", [SMOL, TOOLS, "{{ messages }}{{ tools }}{{ reasoning }}{{ messages[0].thinking }}"])
@pytest.mark.parametrize("tools", SPECS)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_bytes_are_those_of_transformers(folder: Path, source: str, tools: Any, prompt: bool) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate(source, ChatTemplate.of(folder).special)
    for messages in CONVERSATIONS:
        for options in ({}, {"think": True}):
            expected = plain.apply_chat_template(
                messages, tools, chat_template=source, tokenize=False, add_generation_prompt=prompt, **options
            )
            assert ours.render(messages, tools, add_generation_prompt=prompt, **options) == expected


def test_the_folders_own_template_wins(folder: Path, tmp_path: Path) -> None:
    ours = ChatTemplate.of(folder)
    assert ours.source == (folder / "chat_template.jinja").read_text()
    assert ours.special["eos_token"] == "<|im_end|>"
    settings = {"chat_template": "old {{ bos_token }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.of(tmp_path).render([]) == "old <s>"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.of(tmp_path).render([]) == "yes"


def test_a_base_model_gets_plain_words(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    template = ChatTemplate.of(tmp_path)
    assert template.is_default
    assert template.source == DEFAULT
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert template.render(messages) == "User: Hi\nAssistant: Yo</s>\n"
    assert template.render(messages[:1], add_generation_prompt=True) == "User: Hi\nAssistant:"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no chat template, and no end-of-text token") as raised:
        ChatTemplate.of(tmp_path)
    assert "chat_template.jinja" in raised.value.hint


PYTHON = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ (messages | attr('__class__')).x }}",
    "{{ namespace(__class__=1) }}",
]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) if range(99999) | list | length %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ range(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "{{ ('a' * 999999) | replace('a', 'b' * 999999) }}",
    "{{ ('a' * 999999).replace('a', 'b' * 999999) }}",
    "{{ ('a' * 999).translate({97: 'b'}) }}",
    "{{ ['a' * 999999] * 99999 }}",
    "{{ ('a' * 9999).join('b' * 9999) }}",
    "{{ range(99999) | join('a' * 9999) }}",
    "{{ ('a\n' * 99999) | indent(99999) }}",
    "{{ messages | tojson(indent=99999) }}",
    "{{ [[1]] | sum(start=[]) }}",
]


@pytest.mark.parametrize("source", PYTHON)
def test_python_is_out_of_reach(source: str) -> None:
    with pytest.raises(ModelError, match="reaches for Python"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_and_huge_work_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match="does not end well"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("source", ["{% for %}", "{{ (", "{% include 5", "{{ " + "(" * 5000, "x" * (1 << 19)])
def test_what_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match="the chat template is"):
        ChatTemplate(source, {})


def test_refusals_of_messages_name_the_reason() -> None:
    strict = ChatTemplate("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}", {})
    with pytest.raises(InputError, match="refuses these messages: user first"):
        strict.render([{"role": "assistant", "content": "x"}])
    adding = ChatTemplate("{% for m in messages %}{{ m.content + '' }}{% endfor %}", {})
    for content in (None, 3, ["x"]):
        with pytest.raises(InputError, match="cannot print these messages"):
            adding.render([{"role": "user", "content": content}])
    with pytest.raises(InputError, match="not valid Unicode"):
        adding.render([{"role": "user", "content": "\ud800"}])
    with pytest.raises(InputError, match="not an object"):
        adding.render(["x"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="holds a PosixPath, which is not JSON"):
        adding.render([{"role": "user", "content": Path()}])


def test_five_megabytes_are_the_senders_fault() -> None:
    with pytest.raises(TooLargeError, match="too long"):
        ChatTemplate(SMOL, {}).render([{"role": "user", "content": "a" * 5_000_000}])


def test_a_long_conversation_is_no_trouble() -> None:
    messages = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "word " * 100}] * 500
    assert len(ChatTemplate(SMOL, {}).render(messages)) > 500_000


def test_the_digest_is_of_the_source() -> None:
    hexadecimal = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert ChatTemplate("a", {}).sha256 == f"sha256:{hexadecimal}"
