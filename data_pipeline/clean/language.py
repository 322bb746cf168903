"""Detect the language of a text with py3langid, which ships a model of 139 languages and reads 5 MB per CPU-second."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ponder_scale.errors import ConfigError

PACKAGE = "py3langid"


def language(text: str, *, keep: Sequence[str] = (), min_score: float = 0.5, characters: int = 10_000) -> str | None:
    """Drop a text whose first `characters` are in none of the languages to `keep`, or score below `min_score`."""
    if not keep:
        return None
    found, score = _identifier().classify(text[: int(characters)])
    if found not in keep:
        return f"language: {found}" if score >= min_score else "language: unsure"
    return None if score >= min_score else "language: unsure"


def check_languages(keep: Any) -> None:
    """Raise ConfigError if the library is missing or does not know a language."""
    if not isinstance(keep, list) or not keep or not all(isinstance(code, str) for code in keep):
        raise ConfigError(f"keep is {keep!r}; expected a list of languages, such as [en, de]")
    known = sorted(set(_identifier().labels))
    for code in keep:
        if code not in known:
            raise ConfigError(f"keep: {code!r} is not a language of {PACKAGE}; expected some of: {', '.join(known)}")


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ConfigError(f"the language filter needs {PACKAGE}; run: pip install ponder-scale[filters]") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
