"""Turn conversations into texts with a chat template of transformers, and find the parts that the assistant says.

The template marks these parts with `{% generation %}`. Only the template knows where a turn begins and ends, so a
template without these marks is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.document import Spans
from ponder_scale.errors import ConfigError

_BEGIN, _END = "\ufdd0", "\ufdd1"  # code points that occur in no text: Unicode reserves them for programs
_FILE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"

Render = Callable[[list[dict[str, Any]]], tuple[str, Spans] | None]


@lru_cache(maxsize=4)
def open_template(path: Path) -> Render:
    """A function that turns a conversation into its text and the spans that the assistant says.

    The function returns None if the template refuses the conversation or a message contains the internal marks.
    path: a template, or the folder of a tokenizer that has one. Raises ConfigError if it cannot be used.
    """
    import jinja2

    text, names = _read(path)
    if "generation" not in text:
        raise ConfigError(
            f"loss.template: {path} has no {{% generation %}} around what the assistant says, so which of its text "
            f"counts cannot be known; put it there, or give spans"
        )
    try:
        template = _environment().from_string(text)
    except jinja2.TemplateError as error:
        raise ConfigError(f"loss.template: {path} is no chat template that can be read: {error}") from error

    def render(messages: list[dict[str, Any]]) -> tuple[str, Spans] | None:
        marks = (_BEGIN.encode(), _END.encode())
        if any(mark in orjson.dumps(messages, default=str) for mark in marks):
            return None
        try:
            marked = template.render(messages=messages, add_generation_prompt=False, **names)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None
        return _unmarked(marked)

    return render


def content_of(path: Path) -> list[Any]:
    """Everything that decides the template's output, as plain values. Raises ConfigError as `open_template` does."""
    return list(_read(path))


def _read(path: Path) -> tuple[str, dict[str, str]]:
    """The template, and the special tokens that it may name."""
    folder = path if path.is_dir() else path.parent
    settings: dict[str, Any] = {}
    try:
        if (folder / _SETTINGS).is_file():
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        file = path / _FILE if path.is_dir() else path
        found: Any = settings.get("chat_template")
        if file.is_file():
            found = file.read_text(encoding="utf-8")
        elif isinstance(found, list):  # several templates with names
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"loss.template: {path} cannot be read: {error}") from error
    if not isinstance(found, str) or not (path.is_dir() or path.is_file()):
        raise ConfigError(
            f"loss.template: {path} is no chat template; expected a file such as {_FILE}, or the folder of a tokenizer "
            f"that has one"
        )
    names = {}
    for name, value in settings.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            names[name] = token
    return found, names


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, but without the time, so that builds are repeatable."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    return environment


def _unmarked(marked: str) -> tuple[str, Spans]:
    """The text without its marks, and the spans that stood between them."""
    parts, spans, length = [], [], 0
    for number, part in enumerate(marked.replace(_END, _BEGIN).split(_BEGIN)):
        if number % 2 and part:
            spans.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    return "".join(parts), tuple(spans)
