"""An HTML page that needs no other file: one shell, with the content and the data of whoever makes it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import orjson

SHELL = Path(__file__).with_name("page.html")


def page(title: str, content: str, data: Any = None) -> str:
    """The page.

    Args:
        title: plain text, for the tab and the heading.
        content: HTML; `@DATA@` in its script is where the data go.
        data: plain values; numbers that are not finite become null.
    """
    # a text may hold the end tag of the script it is put in
    values = orjson.dumps(data).decode().replace("<", "\\u003c")
    shell = SHELL.read_text(encoding="utf-8").replace("@TITLE@", escape(title))
    return shell.replace("@CONTENT@", content).replace("@DATA@", values)
