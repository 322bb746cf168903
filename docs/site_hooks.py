"""What `make docs` does to the pages before mkdocs reads them. On GitHub you see the same files as they are.

Some files from outside of docs/ become pages, too. Links to all others lead to the repository. mkdocs calls `on_...`.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
ADDRESS = "https://github.com/ponder-scale/ponder-scale"
OUTSIDE = {
    "README.md": "index.md",
    "slurm/README.md": "slurm.md",
    "examples/composition/README.md": "composition.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def place(source: str) -> str | None:
    """Where the site has a file of the repository, from the top of docs/; None if it leaves the file out."""
    inside = source.startswith("docs/") and source.endswith((".md", ".svg", ".png"))
    return source.removeprefix("docs/") if inside else OUTSIDE.get(source)


def rewritten(markdown: str, source: str) -> str:
    """The text of the page that the site makes of a file; `source` is its path in the repository."""

    def target(link: re.Match[str]) -> str:
        name = normpath(join(dirname(source), link[0]))
        if not (REPOSITORY / name).exists():  # an address, or code that looks like a link
            return link[0]
        if page := place(name):
            return relpath(page, dirname(place(source) or ""))
        return f"{ADDRESS}/{'tree' if (REPOSITORY / name).is_dir() else 'blob'}/main/{name}"

    return LINK.sub(target, markdown)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages whose files lie outside docs/."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The page's text, with its links as the site has them."""
    sources = {made: source for source, made in OUTSIDE.items()}
    return rewritten(markdown, sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
