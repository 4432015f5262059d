"""A model's chat template: messages become the very text that transformers makes of them, in a closed sandbox."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError

from llmo.errors import InputError, ModelError, TooLargeError
from llmo.tasks import sandbox

FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names a message's reasoning goes by
MOST_SOURCE = 1 << 18
RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})

# For base models, which come without a template: plain words, and the model's own end of text after each answer.
DEFAULT = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """`source` is Jinja, `special` the model's special tokens by name (`bos_token`, `eos_token`, ...).

    Raises ModelError for a source that is no template.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source = source
        self.special = dict(special)
        if len(source) > MOST_SOURCE:
            raise ModelError(f"the chat template is longer than {MOST_SOURCE} characters", hint="give a shorter one")
        try:
            with sandbox.metered():
                self._compiled = sandbox.environment().from_string(source)
        except (TemplateSyntaxError, RecursionError, MemoryError, SyntaxError) as error:
            line = getattr(error, "lineno", None)
            raise ModelError(
                f"the chat template is not valid Jinja{f' at line {line}' if line else ''}: {error}",
                hint=f"put the model's own {FILE} beside its weights",
            ) from error

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate:
        """The template of a model folder: `chat_template.jinja`, else the one in `tokenizer_config.json`.

        A model without one (a base model) is given `DEFAULT`, which is saved with what is trained from it. Raises
        ModelError when a file cannot be read, or when the model names no end-of-text token to end an answer with.
        """
        settings = _settings(folder)
        special = {name: text for name in SPECIAL if (text := _token(settings.get(name))) is not None}
        if (folder / FILE).is_file():
            try:
                return cls((folder / FILE).read_text(encoding="utf-8"), special)
            except UnicodeDecodeError as error:
                raise ModelError(f"{FILE} is not UTF-8: {error}", where=str(folder / FILE)) from error
        source = _named(settings.get("chat_template"))
        if source is not None:
            return cls(source, special)
        if "eos_token" not in special:
            raise ModelError(
                "the model has no chat template, and no end-of-text token to make one with",
                hint=f"put a {FILE} beside its weights, or name `eos_token` in {SETTINGS}",
                where=str(folder),
            )
        return cls(DEFAULT, special)

    @property
    def sha256(self) -> str:
        """Of the source's UTF-8 bytes, `sha256:<hex>`, as of every file."""
        return "sha256:" + hashlib.sha256(self.source.encode("utf-8")).hexdigest()

    @property
    def is_default(self) -> bool:
        return self.source == DEFAULT

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str:
        """The text the model sees; `options` are the template's own variables, such as `enable_thinking`.

        Raises InputError for messages the template refuses or cannot print, TooLargeError for a text over a
        megabyte, and ModelError for a template that reaches for Python or does not end.
        """
        values = {
            **self.special,
            **{name: _plain(value) for name, value in options.items() if name not in RESERVED},
            "messages": [_with_reasoning(_plain(message)) for message in messages],
            "tools": None if tools is None else _plain(list(tools)),
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        size = 0
        try:
            with sandbox.metered():
                for part in self._compiled.generate(values):
                    parts.append(part)
                    size += len(part)
                    if size > sandbox.LONGEST:
                        break
        except SecurityError as error:
            raise ModelError(f"the chat template reaches for Python: {error}", hint="take another template") from error
        except sandbox.TooMuch as error:
            raise _too_much(messages, error) from None
        except UndefinedError as error:
            raise _unprintable(error) from error
        except TemplateError as error:
            raise InputError(
                f"the model's chat template refuses these messages: {error.message or 'no reason given'}",
                hint="send roles and turns in the order the model was trained on",
            ) from error
        except RecursionError:
            raise _too_much(messages, sandbox.TooMuch("it calls itself without end")) from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise _unprintable(error) from error
        if size > sandbox.LONGEST:
            raise _too_much(messages, sandbox.TooMuch(f"it writes more than {sandbox.LONGEST} characters"))
        return _valid("".join(parts))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{SETTINGS} is not valid JSON: {error}", where=str(path)) from None
    return found if isinstance(found, dict) else {}


def _token(value: Any) -> str | None:
    """Saved as text, or as an object with the text in `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named(value: Any) -> str | None:
    """One template, or a list of named ones, of which `default` is meant."""
    if isinstance(value, list):
        value = next((x.get("template") for x in value if isinstance(x, Mapping) and x.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _plain(value: Any) -> Any:
    """A copy made of JSON's own types: nothing with methods of its own gets into the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    try:
        if isinstance(value, Mapping):
            return {str(key): _plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [_plain(one) for one in value]
    except RecursionError:
        raise InputError("the messages are nested too deeply", hint="send flat messages") from None
    raise InputError(f"a message holds a {type(value).__name__}, which is not JSON", hint="send JSON values only")


def _with_reasoning(message: Any) -> Any:
    """As transformers does: reasoning under any of its names is found under the one that templates read."""
    if not isinstance(message, dict):
        raise InputError("a message is not an object", hint='send {"role": ..., "content": ...}')
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _too_much(messages: Messages, why: sandbox.TooMuch) -> InputError:
    """Whose fault it is: long messages make a long text of any template."""
    if sum(len(str(value)) for message in messages for value in message.values()) > sandbox.LONGEST // 2:
        return TooLargeError(
            "the conversation is too long for the chat template",
            hint=f"send less than {sandbox.LONGEST // 2} characters in all",
        )
    return ModelError(f"the chat template does not end well: {why}", hint="take another template")


def _unprintable(error: Exception) -> InputError:
    return InputError(
        f"the model's chat template cannot print these messages: {error}",
        hint="give every message a `role` and a text `content`",
    )


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the messages are not valid Unicode: a lone surrogate ({text[error.start]!r})",
            hint="send UTF-8; in JSON, escapes like \\ud83d come in pairs",
        ) from None
    return text
