"""A checkpoint's chat template: from messages to the text that the model was trained on."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.text.huggingface import read_tokenizer_config, special_tokens


class ChatTemplate:
    """A Jinja template in a sandbox, with the names and filters that `transformers` gives it.

    (`_cached_compile_jinja_template` in transformers/utils/chat_template_utils.py, but for its training-only
    `generation` tag.) Safe to share between threads.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compile `source`; `special_tokens` ({"bos_token": ...}) are the template's. Raises ValueError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno} of the chat template: {error.message}") from None
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "ChatTemplate | None":
        """Read chat_template.jinja or, if there is none, `chat_template` of tokenizer_config.json.

        Returns None if there is neither: a base model. Raises ValueError, naming the file, for a template
        that does not compile.
        """
        path = directory / "chat_template.jinja"
        if path.exists():
            source = path.read_text()
        else:
            path = directory / "tokenizer_config.json"
            source = _default(read_tokenizer_config(directory).get("chat_template"))
        if not isinstance(source, str):
            return None
        try:
            return cls(source, special_tokens(directory))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt of an answer, special tokens included; encode it without adding them again.

        The messages must be plain JSON values: the sandbox guards what it knows. Raises ValueError with the
        template's own message if it refuses the conversation.
        """
        names = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return self._template.render({**self._special_tokens, **names})
        except Exception as error:  # a template is a program, and may trip over its input in any way
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def _default(chat_template: Any) -> Any:
    """Pick the default of several named templates: [{"name": "default", "template": "..."}, ...]."""
    if not isinstance(chat_template, list):
        return chat_template
    return next((named.get("template") for named in chat_template if named.get("name") == "default"), None)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
