"""Writes the maps of the code into README.md, docs/code.md and CONTRIBUTING.md: python docs/make_tree.py"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("ponder_scale", "data_pipeline", "benchmarks")
OTHERS = {  # folders without a docstring
    "deepspeed_configs": "How to shard, nothing else.",
    "slurm": "Templates for sbatch.",
    "docs": "The guide.",
    "examples": "The quick start as a script; composed facts; instruction tuning of an exported folder.",
    "tests": "Mirrors the packages.",
}
RECIPES = {"ponder_scale": "The quick start and the sizes of the papers.", "data_pipeline": "Corpora to start from."}
COLUMN, WIDTH = 28, 112


def tree() -> str:
    """Each room with what it is for and the modules in it."""
    lines: list[str] = []
    for package in PACKAGES:
        _room(REPOSITORY / package, 0, lines)
    lines += [_line(name + "/", words) for name, words in OTHERS.items()]
    return "\n".join(lines)


def rooms() -> str:
    """The folders at the top and the rooms of the first, a line each with what it is for."""
    lines: list[str] = []
    for package in PACKAGES:
        folder = REPOSITORY / package
        lines.append(_line(f"{package}/", _purpose(folder)))
        inner = sorted(path.parent for path in folder.glob("*/__init__.py")) if package == PACKAGES[0] else []
        lines += [_line(f"    {room.name}/", _purpose(room)) for room in inner]
    lines += [_line(f"{name}/", words) for name, words in OTHERS.items()]
    return "\n".join(lines)


def floors() -> str:
    """The layers that import-linter checks, from top to bottom; rooms of one floor do not import each other."""
    tools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    contracts = [contract for contract in tools["importlinter"]["contracts"] if contract["type"] == "layers"]
    return "\n\n".join(
        "\n".join([f"{contract['containers'][0]}:", *(f"    {floor}" for floor in contract["layers"])])
        for contract in contracts
    )


def written(document: str, name: str, content: str) -> str:
    """A document with the content in its block of that name."""
    begin, end = f"<!-- {name}: made by docs/make_tree.py -->", f"<!-- end of {name} -->"
    block = f"{begin}\n```\n{content}\n```\n{end}"
    made, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, document, flags=re.DOTALL)
    assert count == 1, f"{begin} stands {count} times"
    return made


def _room(folder: Path, depth: int, lines: list[str]) -> None:
    indent = "    " * depth
    lines.append(_line(f"{indent}{folder.name}/", _purpose(folder)))
    modules = " ".join(sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")))
    lines += textwrap.wrap(modules, WIDTH, initial_indent=indent + "    ", subsequent_indent=indent + "    ")
    if (folder / "recipes").is_dir():
        lines.append(_line(f"{indent}    recipes/", RECIPES[folder.name]))
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        _room(inner, depth + 1, lines)


def _purpose(folder: Path) -> str:
    """The first sentence of the docstring of a package."""
    words = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert words, f"{folder}/__init__.py: expected a docstring that says what the room is for"
    return words.splitlines()[0].partition(". ")[0].rstrip(".")


def _line(name: str, words: str) -> str:
    return f"{name:<{COLUMN}}{words}"


if __name__ == "__main__":
    for file, name, made in (
        ("README.md", "rooms", rooms()),
        ("docs/code.md", "tree", tree()),
        ("CONTRIBUTING.md", "floors", floors()),
    ):
        path = REPOSITORY / file
        path.write_text(written(path.read_text(encoding="utf-8"), name, made), encoding="utf-8")
