"""Find the files that a glob names: enter linked folders, name each file once, and list hidden files apart."""

# ruff: noqa: PTH110, PTH112, PTH113, PTH114, PTH116, PTH118

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

HIDDEN = "hidden files"
TWICE = "files that are there by another name too"
NOWHERE = "links that lead nowhere"
NO_FILE = "neither file nor folder"

_WILD = frozenset("*?[")


class Found(NamedTuple):
    """The files that a glob names, sorted by name, and those left out, by reason."""

    files: list[Path]
    left_out: dict[str, list[Path]]


class _Place(NamedTuple):
    """A folder to search for names that match the parts of the pattern from number `part` on."""

    path: str  # the name under which it was found
    real: str  # the path without links
    part: int
    hidden: bool  # reached through a hidden name that the pattern does not spell


def is_glob(text: str) -> bool:
    """Whether a path or a part of one contains wildcards."""
    return not _WILD.isdisjoint(text)


def alternatives(text: str) -> list[str]:
    """The paths that a path with `{a,b}` stands for, in the order of the alternatives, as in a shell."""
    depth, begin, cuts = 0, 0, [0]
    for position, character in enumerate(text):
        if character == "{":
            depth += 1
            if depth == 1:
                begin, cuts = position, [position]
        elif character == "," and depth == 1:
            cuts.append(position)
        elif character == "}" and depth:
            depth -= 1
            if not depth and len(cuts) > 1:
                parts = [text[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], position], strict=True)]
                return [found for part in parts for found in alternatives(text[:begin] + part + text[position + 1 :])]
    return [text]


def walk(base: Path, parts: Sequence[str], exclude: Iterable[str] = ()) -> Found:
    """The files under `base` that match a relative pattern, given in its parts. Names that match `exclude` are left
    out.

    `**` matches any number of folders. As in a shell, a wildcard matches a hidden name (one that begins with a dot)
    only if the wildcard part begins with a dot itself. Other hidden matches are left out and listed. Raises OSError for
    a folder that cannot be read.
    """
    looker = _Walk(parts, list(exclude))
    looker.folders.append(_Place(str(base), os.path.realpath(base), 0, False))
    while looker.folders or looker.links:
        if looker.folders:
            looker.visit(looker.folders.pop())
        else:  # last, so that a file gets a name without links if it has one
            looker.links.sort(reverse=True)
            looker.visit(looker.links.pop())
    return looker.found()


class _Walk:
    def __init__(self, parts: Sequence[str], exclude: Sequence[str]) -> None:
        self.folders: list[_Place] = []
        self.links: list[_Place] = []
        self._parts, self._exclude = parts, exclude
        self._seen: set[tuple[int, int, int, bool]] = set()
        self._files: list[tuple[bool, bool, Path, str]] = []  # hidden, found through a link, name, real name
        self._left_out: dict[str, list[Path]] = {}

    def visit(self, at: _Place) -> None:
        """Search one folder."""
        try:
            about = os.stat(at.path)
        except (FileNotFoundError, NotADirectoryError):
            return
        key = (about.st_dev, about.st_ino, at.part, at.hidden)
        if key in self._seen:  # seen under another name, or a circle of links
            return
        self._seen.add(key)
        part = self._parts[at.part]
        if not is_glob(part):
            self._take(at, part, at.hidden)
            return
        if part == "**" and at.part + 1 < len(self._parts):
            self.folders.append(at._replace(part=at.part + 1))
        with os.scandir(at.path) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if part == "**" or fnmatch.fnmatchcase(name, part):
                self._take(at, name, at.hidden or (name.startswith(".") and not part.startswith(".")))

    def _take(self, at: _Place, name: str, hidden: bool) -> None:
        if any(fnmatch.fnmatch(name, excluded) for excluded in self._exclude):
            return
        path = os.path.join(at.path, name)
        linked = name == ".." or os.path.islink(path)
        real = os.path.realpath(path) if linked else os.path.join(at.real, name)
        last = at.part + 1 == len(self._parts)
        if os.path.isdir(path):
            part = at.part if self._parts[at.part] == "**" else at.part + 1
            if part < len(self._parts):
                (self.links if linked else self.folders).append(_Place(path, real, part, hidden))
        elif last and os.path.isfile(path):
            self._files.append((hidden, path != real, Path(path), real))
        elif last and os.path.lexists(path):
            self._left_out.setdefault(NO_FILE if os.path.exists(path) else NOWHERE, []).append(Path(path))

    def found(self) -> Found:
        """All files, each once."""
        files, known = [], {}
        for hidden, _, path, real in sorted(self._files):
            if real not in known:
                known[real] = path
                if not hidden:
                    files.append(path)
                    continue
            elif known[real] == path:  # several `**` in the pattern can match the same file twice
                continue
            self._left_out.setdefault(HIDDEN if hidden else TWICE, []).append(path)
        return Found(sorted(files), {reason: sorted(paths) for reason, paths in sorted(self._left_out.items())})
