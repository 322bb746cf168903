"""Filters: each is a function of a text that returns the reason to drop it, or None. Thresholds are arguments.

Gopher is Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A.1.1
(quality) and table A1 (repetition). Shares are counted as datatrove counts them, and words are split at white space. C4
is Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.2. Of its rules that delete lines, only
the one for endless words is here. Apply the others when you prepare a corpus.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.clean.decontamination import evaluation_sets, files_of
from data_pipeline.clean.language import PACKAGE, check_languages, language
from data_pipeline.clean.personal import personal
from data_pipeline.clean.weblists import NO_URL, url
from data_pipeline.read.compressed import CHUNK
from data_pipeline.read.remote import is_remote, open_file
from ponder_scale.errors import ConfigError
from ponder_scale.files.write import hash_file

Filter = Callable[[str], str | None]
# returns the text that is left, and how much was removed or replaced
Edit = Callable[[str], tuple[str, dict[str, int]]]

_GOPHER_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)]*(?:\s|$)")
NOT_SAMPLED = "not in the sample"
LINES = "lines"
_BLANK_LINES = re.compile(r"\n\s*\n")


def length(text: str, *, min_characters: int = 1, max_characters: int | None = None) -> str | None:
    """Drop a text that is too short or too long, in characters."""
    if len(text) < min_characters:
        return "length: too short"
    return "length: too long" if max_characters is not None and len(text) > max_characters else None


def gopher_quality(
    text: str,
    *,
    min_words: int = 50,
    max_words: int = 100_000,
    min_mean_word: float = 3.0,
    max_mean_word: float = 10.0,
    max_symbols_per_word: float = 0.1,
    max_bullet_lines: float = 0.9,
    max_ellipsis_lines: float = 0.3,
    min_alphabetic_words: float = 0.8,
    min_stop_words: int = 2,
) -> str | None:
    """Gopher's quality rules on the number and mean length of words, symbols, bullets, ellipses, letters and stop
    words.
    """
    words = text.split()
    if not min_words <= len(words) <= max_words:
        return "gopher_quality: number of words"
    if not min_mean_word <= sum(map(len, words)) / len(words) <= max_mean_word:
        return "gopher_quality: mean length of words"
    ellipses = text.count("...") + text.count("…")
    if max(text.count("#"), ellipses) > max_symbols_per_word * len(words):
        return "gopher_quality: symbols"
    lines = [line for line in text.splitlines() if line.strip()]
    if sum(line.lstrip().startswith(("•", "-", "*", "‣")) for line in lines) > max_bullet_lines * len(lines):
        return "gopher_quality: bullets"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) > max_ellipsis_lines * len(lines):
        return "gopher_quality: ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) < min_alphabetic_words * len(words):
        return "gopher_quality: words without letters"
    if len(_GOPHER_STOP_WORDS.intersection(map(str.lower, words))) < min_stop_words:
        return "gopher_quality: stop words"
    return None


def gopher_repetition(
    text: str,
    *,
    max_duplicate_lines: float = 0.3,
    max_duplicate_paragraphs: float = 0.3,
    max_duplicate_line_characters: float = 0.2,
    max_duplicate_paragraph_characters: float = 0.2,
    max_top_n_grams: Sequence[float] = (0.2, 0.18, 0.16),
    max_duplicate_n_grams: Sequence[float] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
) -> str | None:
    """Gopher's repetition rules.

    They limit repeated lines and paragraphs, the most frequent 2- to 4-gram, and repeated 5- to 10-grams, as shares of
    the lines, the paragraphs and all characters. All kinds of line ends are treated alike.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for name, pieces, count_bound, character_bound in (
        ("lines", [line.strip() for line in text.split("\n")], max_duplicate_lines, max_duplicate_line_characters),
        ("paragraphs", _BLANK_LINES.split(text.strip()), max_duplicate_paragraphs, max_duplicate_paragraph_characters),
    ):
        repeated, characters = _repeated([piece for piece in pieces if piece.strip()])
        if repeated > count_bound or characters > character_bound * len(text):
            return f"gopher_repetition: {name}"
    words = text.split()
    for n, bound in enumerate(max_top_n_grams, start=2):
        if _top_n_gram(words, n) > bound * len(text):
            return f"gopher_repetition: most frequent {n}-gram"
    for n, bound in enumerate(max_duplicate_n_grams, start=5):
        if _in_repeated_n_grams(words, n) > bound * len(text):
            return f"gopher_repetition: {n}-grams"
    return None


def c4(
    text: str, *, min_sentences: int = 5, max_lorem_ipsum: int = 0, max_braces: int = 0, max_word: int = 1000
) -> str | None:
    """C4's rules for whole pages, after `c4_lines`: sentences, placeholder text, and braces as a sign of code."""
    text, _ = c4_lines(text, max_word=max_word)
    lowered = text.lower()
    if lowered.count("lorem ipsum") > max_lorem_ipsum:
        return "c4: lorem ipsum"
    if text.count("{") > max_braces:
        return "c4: braces"
    if not text.strip() or sum(1 for _ in _SENTENCE_END.finditer(text)) < min_sentences:
        return "c4: number of sentences"
    return None


def c4_lines(text: str, *, max_word: int = 1000, **of_pages: int) -> tuple[str, dict[str, int]]:
    """C4's rule for lines: remove each line with a word longer than `max_word`, and keep the rest of the page."""
    if max(map(len, text.split()), default=0) <= max_word:
        return text, {}
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if max(map(len, line.split()), default=0) <= max_word]
    return "".join(kept), {LINES: len(lines) - len(kept)}


def decontaminate(text: str, *, against: Sequence[str] = (), field: str = "text", n: int = 13) -> str | None:
    """Drop a text that shares n consecutive words with an evaluation set. Sets are paths of jsonl, parquet or text
    files.
    """
    if not against:
        return None
    name = evaluation_sets(tuple(against), field, n).hit(text, n)
    return f"decontaminate: {name}" if name else None


FILTERS: dict[str, Callable[..., str | None]] = {
    "length": length,
    "gopher_quality": gopher_quality,
    "gopher_repetition": gopher_repetition,
    "c4": c4,
    "decontaminate": decontaminate,
    "language": language,
    "url": url,  # judges the document's URL, not its text
}
# Applied before any filter looks at a text.
EDITS: dict[str, Callable[..., tuple[str, dict[str, int]]]] = {"c4": c4_lines, "pii": personal}
_OF_FILES = {"decontaminate": "against", "url": "block"}  # filters that read files, with the key that names them


def chosen(source: str, filters: Mapping[str, Any]) -> list[Filter]:
    """The filters of a source with their thresholds, in the given order.

    Raises ConfigError for an unknown filter or threshold.
    """
    found: list[Filter] = []
    for name, thresholds in filters.items():
        key = f"sources.{source}.filters.{name}"
        if ":" not in name and name not in {**FILTERS, **EDITS}:
            known = ", ".join({**FILTERS, **EDITS})
            raise ConfigError(f"{key}: no such filter; expected one of: {known}, or MODULE:FUNCTION")
        function = _imported(key, name) if ":" in name else FILTERS.get(name) or EDITS[name]
        _check_thresholds(key, function, thresholds, own=":" in name)
        screen: Any = partial(function, **(thresholds or {}))
        if name in _OF_FILES:
            given = screen.keywords.get(_OF_FILES[name])
            if not given or isinstance(given, str):
                what = "evaluation set" if name == "decontaminate" else "block list"
                raise ConfigError(f"{key}.{_OF_FILES[name]} names no {what}; give a list of files")
            screen("")  # reads the files now, so that errors appear early
        if name == "language":
            try:
                check_languages((thresholds or {}).get("keep"))
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from error
        if name in FILTERS and name != "url":
            found.append(screen)
        elif ":" in name:
            found.append(_guarded(key, screen))
    return found


def blocked(filters: Mapping[str, Any]) -> Callable[[str | None], str | None] | None:
    """A function from a document's URL to the reason to drop it. None if the source has no filter on URLs."""
    if "url" not in filters:
        return None
    screen: Any = partial(url, **(filters["url"] or {}))
    return lambda address: NO_URL if address is None else screen(address)


def _check_thresholds(key: str, function: Callable[..., Any], thresholds: Any, *, own: bool) -> None:
    """Raise ConfigError for a threshold that the filter does not have, and for an invalid value."""
    parameters = inspect.signature(function).parameters
    known = list(parameters)[1:]
    if not isinstance(thresholds or {}, Mapping):
        raise ConfigError(f"{key} is {thresholds!r}; expected thresholds by name: {{{known[0]}: NUMBER}}")
    for threshold, value in (thresholds or {}).items():
        if threshold not in known:
            raise ConfigError(f"{key}.{threshold}: unknown threshold; expected one of: {', '.join(known)}")
        default = parameters[threshold].default
        may_be_null = default is None or "None" in str(parameters[threshold].annotation)
        if own or default == () or (value is None and may_be_null):
            continue
        if isinstance(default, str):
            if not isinstance(value, str):
                raise ConfigError(f"{key}.{threshold} is {value!r}; expected text")
            continue
        several = isinstance(default, tuple)
        if not (isinstance(value, list) and all(map(_is_bound, value)) if several else _is_bound(value)):
            expected = f"a list of numbers, such as {list(default)}, each" if several else "a number,"
            raise ConfigError(f"{key}.{threshold} is {value!r}; expected {expected} at least 0")


def _is_bound(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def identities(filters: Mapping[str, Any]) -> dict[str, str]:
    """Everything besides settings that decides which documents a source's filters drop.

    It holds the hash of the file of each user's own function, of each evaluation set and of each block list, and the
    version of the language library.
    """
    found = {}
    for name, thresholds in filters.items():
        if ":" in name:
            file = inspect.getsourcefile(_imported(name, name))
            found[name] = hash_file(Path(file)) if file else ""
        if name in _OF_FILES:
            named = files_of((thresholds or {}).get(_OF_FILES[name], ()), name)
            found |= {file.name: _hash(file.path) for file in named}
        if name == "language":
            found[name] = f"{PACKAGE} {version(PACKAGE)}"
    return found


def _hash(path: str) -> str:
    """The hash of a file's bytes. The file may be remote."""
    if not is_remote(path):
        return hash_file(Path(path))
    whole = xxhash.xxh3_128()
    with open_file(path) as stream:
        while chunk := stream.read(CHUNK):
            whole.update(chunk)
    return whole.hexdigest()


def _imported(key: str, name: str) -> Callable[..., str | None]:
    """Import a user's own filter, MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        inspect.signature(found)
    except Exception as error:  # importing a module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{key}: {name} cannot be used ({reason}); expected MODULE:FUNCTION, with the module's folder in PYTHONPATH"
        ) from error
    return found


def _guarded(key: str, screen: Filter) -> Filter:
    """Wrap a user's own filter, so that its errors become one line."""

    def guarded(text: str) -> str | None:
        try:
            reason = screen(text)
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"{key} failed ({what}) for a text that begins with {text[:60]!r}") from error
        if reason is not None and not (isinstance(reason, str) and reason):
            raise ConfigError(f"{key} returned {reason!r}; expected the reason to drop a text, or None to keep it")
        return reason

    return guarded


def sampled(share: float, seed: int) -> Filter:
    """Keep a share of the documents, chosen by a hash of their stripped text. The held-out split uses another seed."""
    bound = int(share * 2**64)

    def screen(text: str) -> str | None:
        return None if xxhash.xxh3_64_intdigest(text.strip().encode(), seed=2**32 + seed) < bound else NOT_SAMPLED

    return screen


def edits(filters: Mapping[str, Any]) -> list[Edit]:
    """The edits that a source's filters make in texts that they keep. `chosen` has checked their thresholds."""
    return [partial(EDITS[name], **(thresholds or {})) for name, thresholds in filters.items() if name in EDITS]


def _repeated(pieces: list[str]) -> tuple[float, int]:
    """The share of pieces that repeat an earlier piece, and the characters in those repeats."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count, characters = count + 1, characters + len(piece)
        seen.add(piece)
    return count / max(1, len(pieces)), characters


def _top_n_gram(words: list[str], n: int) -> int:
    """Characters in all occurrences of the most frequent n-gram, including spaces. 0 if no n-gram occurs twice."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not counts:
        return 0
    gram, count = counts.most_common(1)[0]
    return count * len(" ".join(gram)) if count > 1 else 0


def _in_repeated_n_grams(words: list[str], n: int) -> int:
    """Characters in the words of n-grams that occurred before. After a repeat, the search continues behind it."""
    seen: set[tuple[str, ...]] = set()
    begin = characters = 0
    while begin <= len(words) - n:
        gram = tuple(words[begin : begin + n])
        if gram in seen:
            characters += sum(map(len, gram))
            begin += n
        else:
            seen.add(gram)
            begin += 1
    return characters
