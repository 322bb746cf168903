"""Tokenize texts of which only some characters count in the loss.

A text is cut at each place where counting begins or ends, and each piece is tokenized on its own. No token therefore
lies on both sides of a cut. The tokens before a cut are those that a model receives when it has to continue from there.
A tokenizer that encodes pieces unlike the whole text is refused, for example one that puts a space before each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.document import Record
from data_pipeline.tokenize.backends import Encode
from data_pipeline.tokenize.tokenizer import Tokenizer
from ponder_scale.errors import TokenizerError

_CUTS = (("word", "word"), ("one ", "two"), ("a line\n", " another"), ("(1)", "+2"), ("Größe", "数学"))


class Encoded(NamedTuple):
    """The tokens of some documents."""

    tokens: np.ndarray  # (n,), document after document
    lengths: np.ndarray  # (documents,)
    counts: np.ndarray | None  # (n,) bool, whether each token counts in the loss; None if all do

    def first(self, documents: int) -> Encoded:
        """The first `documents` of them."""
        end = int(self.lengths[:documents].sum())
        return Encoded(self.tokens[:end], self.lengths[:documents], None if self.counts is None else self.counts[:end])


def encode_documents(encode: Encode, records: Sequence[Record], masked: bool) -> Encoded:
    """The tokens of the texts of some records. If the source is `masked`, also which of them count in the loss."""
    if not masked:
        return Encoded(*encode([record.text or "" for record in records]), None)
    pieces, counting, of_document = [], [], []
    for number, record in enumerate(records):
        for piece, counts in _cut(record):
            pieces.append(piece)
            counting.append(counts)
            of_document.append(number)
    tokens, sizes = encode(pieces)
    lengths = np.bincount(of_document, weights=sizes, minlength=len(records)).astype(np.int64)
    return Encoded(tokens, lengths, np.repeat(np.array(counting, dtype=bool), sizes))


def framed(documents: Encoded, bos_id: int | None, eod_id: int | None) -> Encoded:
    """Add begin and end tokens to the documents, if there are any.

    The end token counts in the loss if the end of the text does. The begin token follows another document and never
    counts.
    """
    tokens, lengths, counts = documents
    if bos_id is not None:
        begins = np.cumsum(lengths) - lengths
        tokens = np.insert(tokens, begins, bos_id)
        counts = None if counts is None else np.insert(counts, begins, False)
        lengths = lengths + 1
    if eod_id is not None:
        ends = np.cumsum(lengths)
        tokens = np.insert(tokens, ends, eod_id)
        if counts is not None:
            # The inserted False gives each end a token before it. In a document without tokens, none counts.
            counts = np.insert(counts, ends, np.insert(counts, 0, False)[ends] & (lengths > 0))
        lengths = lengths + 1
    return Encoded(tokens, lengths, counts)


def check_cuts(tokenizer: Tokenizer) -> None:
    """Raise TokenizerError if the tokens of a text's pieces decode to another text than those of the whole."""
    for pair in _CUTS:
        pieces, _ = tokenizer.encode_batch(pair)
        whole, _ = tokenizer.encode_batch(["".join(pair)])
        if tokenizer.decode(pieces.tolist()) != tokenizer.decode(whole.tolist()):
            raise TokenizerError(
                f"tokenizer {tokenizer.path}: the pieces {pair[0]!r} and {pair[1]!r} do not become the text "
                f"{''.join(pair)!r} but {tokenizer.decode(pieces.tolist())!r}, so a text cannot be cut where it begins "
                f"to count in the loss; for sources with loss, use a tokenizer that puts nothing before a text"
            )


def _cut(record: Record) -> list[tuple[str, bool]]:
    """The pieces of a text, and whether each counts in the loss."""
    assert record.text is not None and record.counts is not None
    pieces, done = [], 0
    for begin, end in record.counts:
        pieces += [(record.text[done:begin], False), (record.text[begin:end], True)]
        done = end
    return [(piece, counts) for piece, counts in [*pieces, (record.text[done:], False)] if piece]
