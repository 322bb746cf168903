"""Find out why a line is not valid JSON. Speed does not matter here, because only bad lines come this far."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from data_pipeline.document import DEEP, NOT_A_NUMBER, NOT_JSON, NOT_PLAIN, NOT_UTF8, SURROGATE

_PACKED = (  # gzip, zstd, bzip2, xz, zip, parquet, 7z, lz4
    *(b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"),
    *(b"PK\x03\x04", b"PAR1", b"7z\xbc\xaf", b"\x04\x22\x4d\x18"),
)
_TOKEN = re.compile(rb'["{}\[\]:,]')


REPAIRABLE = (NOT_A_NUMBER, SURROGATE)


def repaired(line: bytes) -> Any:
    """The value of a line with an error in REPAIRABLE. Lone surrogates are replaced by U+FFFD."""
    value = json.loads(line.decode("utf-8-sig"))
    # Surrogate pairs have already become one character, so any surrogate that is left is a lone one.
    return json.loads(re.sub(r"[\ud800-\udfff]", "\ufffd", json.dumps(value, ensure_ascii=False)))


def is_packed(content: bytes) -> bool:
    """Whether a file that begins like this is compressed, an archive or parquet."""
    return content.startswith(_PACKED)


def why_not(line: bytes) -> str:
    """The reason why a line is not JSON that can be read here."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return NOT_PLAIN if is_packed(line) else NOT_UTF8
    numbers: list[str] = []

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            numbers.append(digits)
        return value

    try:
        json.loads(text, parse_constant=numbers.append, parse_float=number)
    except RecursionError:
        return DEEP
    except ValueError:
        return NOT_PLAIN if is_packed(line) else NOT_JSON
    if numbers:
        return NOT_A_NUMBER
    return SURROGATE if re.search(r"\\u[dD][89a-fA-F]", text) else DEEP


def is_cut_at(line: bytes, field: str) -> bool:
    """Whether a truncated line ends inside the string value of `field`."""
    opened: list[Any] = []  # the current key of each open object; None for a list
    last, position = b"", 0
    while token := _TOKEN.search(line, position):
        position, content = token.end(), token.group()
        if content in (b"{", b"["):
            opened.append(b"" if content == b"{" else None)
        elif content in (b"}", b"]"):
            opened = opened[:-1]
        elif content != b'"':
            if opened and opened[-1] is not None:
                opened[-1] = last if content == b":" else b""
        elif (end := _end_of_string(line, position)) < 0:
            return all(opened) and ".".join(map(json.loads, opened)) == field
        else:
            last, position = line[position - 1 : end], end
    return False


def _end_of_string(line: bytes, position: int) -> int:
    """The position after the quote that ends the string beginning at `position`; -1 if no quote ends it."""
    while (quote := line.find(b'"', position)) >= 0:
        position, before = quote + 1, quote
        while line[before - 1] == ord("\\"):
            before -= 1
        if (quote - before) % 2 == 0:
            return position
    return -1
