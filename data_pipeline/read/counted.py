"""Find the characters of a document that count in the loss, from the fields of its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.config import SourceConfig
from data_pipeline.document import (
    BAD_MESSAGES,
    BAD_SPANS,
    EMPTY,
    NO_FIELD,
    NO_LABEL,
    NOT_TEXT,
    NOT_UTF8,
    TOO_LONG,
    Record,
    Spans,
)
from data_pipeline.read.chat import open_template
from ponder_scale.errors import ConfigError


class _Unfit(Exception):
    """The record is not a document. The message is the reason, one of those in `document`."""


def named_fields(config: SourceConfig) -> dict[str, str]:
    """The fields of a record that make up its document, by the setting that names each."""
    loss = config.loss
    if loss is None:
        return {"field": config.field}
    if loss.spans is not None:
        return {"field": config.field, "loss.spans": loss.spans}
    if loss.messages is not None:
        return {"loss.messages": loss.messages}
    assert loss.prompt is not None and loss.completion is not None
    return {"loss.prompt": loss.prompt, "loss.completion": loss.completion}


def fields_of(config: SourceConfig) -> list[str]:
    """The names of the fields that make up a document."""
    return list(named_fields(config).values())


def all_fields(config: SourceConfig) -> list[str]:
    """All fields of a record to read. They include the URL if a filter needs it."""
    return list(dict.fromkeys([*fields_of(config), *([] if config.url_field is None else [config.url_field])]))


def check_fields(source: str, config: SourceConfig, columns: Sequence[str], path: str) -> None:
    """Raise ConfigError for a field that is not among the columns of an input."""
    of_url = {} if config.url_field is None else {"filters.url.field": config.url_field}
    for key, field in {**named_fields(config), **of_url}.items():
        if field not in columns:
            raise ConfigError(f"sources.{source}.{key} is {field!r}; the columns of {path} are: {', '.join(columns)}")


def record_of(
    offset: int, size: int | None, value_of: Callable[[str], Any], config: SourceConfig, max_bytes: int
) -> Record:
    """The record of a source with `loss`. `value_of` returns a field or raises KeyError. size: None for that of the
    text.
    """
    try:
        text, counts = _counted(value_of, config)
    except KeyError:
        return Record(offset, size or 0, None, NO_FIELD)
    except UnicodeDecodeError:
        return Record(offset, size or 0, None, NOT_UTF8)
    except _Unfit as reason:
        return Record(offset, size or 0, None, str(reason))
    length = len(text.encode("utf-8", "surrogatepass"))
    size = length if size is None else size
    if length > max_bytes:
        return Record(offset, size, None, TOO_LONG)
    if not text or text.isspace():
        return Record(offset, size, None, EMPTY)
    return Record(offset, size, text, "", counts) if counts else Record(offset, size, None, NO_LABEL)


def _counted(value_of: Callable[[str], Any], config: SourceConfig) -> tuple[str, Spans]:
    """The text of a document, and its characters that count in the loss."""
    assert config.loss is not None
    first, *others = (value_of(field) for field in fields_of(config))
    if config.loss.template is not None:
        return _conversation(first, Path(config.loss.template))
    text = _text(first)
    if config.loss.spans is not None:
        return text, _spans(others[0], len(text))
    whole = text + _text(others[0])
    return whole, ((len(text), len(whole)),) if len(text) < len(whole) else ()


def _conversation(value: Any, template: Path) -> tuple[str, Spans]:
    if not isinstance(value, list) or not value or any(not isinstance(message, dict) for message in value):
        raise _Unfit(BAD_MESSAGES)
    # A column of a table gives each message all fields that any message has.
    messages = [{key: entry for key, entry in message.items() if entry is not None} for message in value]
    rendered = open_template(template)(messages)
    if rendered is None:
        raise _Unfit(BAD_MESSAGES)
    return rendered


def _text(value: Any) -> str:
    if isinstance(value, bytes):  # some programs write text as bytes
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _Unfit(NOT_UTF8) from error
    if not isinstance(value, str):
        raise _Unfit(NOT_TEXT)
    return value


def _spans(value: Any, length: int) -> Spans:
    """Sort and merge spans that may touch or overlap, so that they ascend with gaps between them."""
    if not isinstance(value, list):
        raise _Unfit(BAD_SPANS)
    joined: list[tuple[int, int]] = []
    for span in value:
        if not isinstance(span, list) or len(span) != 2 or any(type(place) is not int for place in span):
            raise _Unfit(BAD_SPANS)
        if not 0 <= span[0] <= span[1] <= length:
            raise _Unfit(BAD_SPANS)
    for begin, end in sorted(span for span in value if span[0] < span[1]):
        if joined and begin <= joined[-1][1]:
            begin, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((begin, end))
    return tuple(joined)
