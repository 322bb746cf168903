"""Find the evaluation set that shares n consecutive words with a text. GPT-3 (Brown et al. 2020, appendix C) used 13.

Words are those of `dedup`, which ignore case, punctuation and white space. An n-gram is kept as a 64-bit hash. A text
of a million words matches a set of a million n-grams by chance about once in 10^7 cases.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash

from data_pipeline.clean.dedup import n_gram_hashes, words_of
from data_pipeline.config import SourceConfig
from data_pipeline.document import Piece
from data_pipeline.read.readers import read
from data_pipeline.read.remote import is_remote, name_of
from data_pipeline.read.sources import LeftOut, files, kind_of, split
from data_pipeline.read.walk import NOWHERE
from ponder_scale.errors import ConfigError

_MAX_TEXT_BYTES = 2**26


class EvaluationSets(NamedTuple):
    """The n-grams of all evaluation sets."""

    names: list[str]
    grams: np.ndarray  # (n,) uint64, ascending
    sets: np.ndarray  # (n,) the first set that contains each n-gram

    def hit(self, text: str, n: int) -> str | None:
        """The set that contains the text's first n-gram found in any set; None if no set has any."""
        grams = n_gram_hashes(words_of(text), n)
        if not len(grams):
            return None
        places = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        found = np.flatnonzero(self.grams[places] == grams)
        return self.names[int(self.sets[places[found[0]]])] if len(found) else None


@lru_cache(maxsize=4)
def evaluation_sets(paths: tuple[str, ...], field: str, n: int) -> EvaluationSets:
    """The n-grams of the texts in some files, which give the sets their names. Texts of fewer than n words have none.

    Raises ConfigError for a file with a record that cannot be read, and for a file in which every text is too short.
    """
    if not isinstance(n, int) or n < 1:
        raise ConfigError(f"decontaminate: n is {n}; expected at least 1 word, and a whole number")
    names: list[str] = []
    parts, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for file in files_of(paths, "decontaminate"):
        source = SourceConfig(kind=kind_of(file.path), path=file.path, field=field)
        grams = []
        for piece in split(file, source, 2**62):
            for record in read(piece, source, _MAX_TEXT_BYTES, xxhash.xxh3_128()):
                if record.text is None:
                    raise ConfigError(
                        f"decontaminate: {file.name} at {record.offset:,}: {record.reason}; every record of an "
                        f"evaluation set must be readable; correct this one, or name the right field"
                    )
                grams.append(n_gram_hashes(words_of(record.text), n))
        if not sum(map(len, grams)):
            raise ConfigError(f"decontaminate: no text of {file.name} has {n} words; lower n or leave it out")
        parts.append(np.concatenate(grams))
        owners.append(np.full(len(parts[-1]), len(names)))
        names.append(name_of(file.path))
    every, first = np.unique(np.concatenate(parts), return_index=True)
    return EvaluationSets(names, every, np.concatenate(owners)[first])


def files_of(paths: Iterable[str], filter_name: str) -> list[Piece]:
    """The files that some paths and globs of a filter name.

    Raises ConfigError for a path that names no file, and for a broken link.
    """
    found, left_out = [], LeftOut()
    for path in paths:
        try:
            found += files({path: SourceConfig(kind=kind_of(path), path=path)}, left_out)
        except ConfigError as error:
            said = str(error).partition(f"{path}: ")[2] if is_remote(path) else ""
            what = f"{path}: {said or 'no such file, and no file matches it as a glob'}"
            raise ConfigError(f"{filter_name}: {what}") from error
    for line in left_out.of(NOWHERE):
        raise ConfigError(f"{filter_name}: {line}; repair the link, or name the files without it")
    return found
