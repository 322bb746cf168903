"""Make an HTML page that needs no other file, from a shared shell and the caller's content and data."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import orjson

SHELL = Path(__file__).with_name("page.html")


def page(title: str, content: str, data: Any = None) -> str:
    """The text of the page.

    Args:
        title: plain text for the tab and the heading.
        content: HTML. The data replace `@DATA@` in its script.
        data: plain values. Numbers that are not finite become null.
    """
    # "<" is escaped, because a text in the data could otherwise close the script element
    values = orjson.dumps(data).decode().replace("<", "\\u003c")
    shell = SHELL.read_text(encoding="utf-8").replace("@TITLE@", escape(title))
    return shell.replace("@CONTENT@", content).replace("@DATA@", values)
