"""The content of a sequence, by `data.packing`, and a reader that reads sequences from memory-mapped shards.

concat: sequence j of a shard is its tokens [j L, j L + L], with L = seq_len. Neighbours share one token, so that each
token is predicted exactly once. Documents are cut wherever a sequence ends.

best-fit: sequence j of a shard is bin j of its packing (`ponder_scale/shards/packing.py`). A bin holds whole documents,
or the rest of a long one. A label counts only if it is the token that follows in the text. So it does not count at the
first token of a rest, nor at the end of a bin that no document fills. The first token of a whole document is predicted
from the end of the document before it, as under concat.

If a shard has a mask, a label that the mask excludes does not count, wherever it lies in a sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ponder_scale.config import DataConfig
from ponder_scale.data.order import Places
from ponder_scale.shards.format import Shard
from ponder_scale.shards.packing import Bins, Packing

IGNORE_INDEX = -100


class MicroBatch(NamedTuple):
    """The input of one forward: B sequences of T = seq_len predicted tokens."""

    tokens: torch.Tensor  # (B, T + 1) int64; the model reads the first T
    labels: torch.Tensor  # (B, T) int64, the token that follows each; IGNORE_INDEX where it does not count
    position_ids: torch.Tensor | None  # (B, T) int64, from 0 in each document; None if not needed

    def split(self, rows: int) -> list[MicroBatch]:
        """Split this into micro-batches of `rows` rows each."""
        positions = [None] * len(self.tokens) if self.position_ids is None else self.position_ids.split(rows)
        triples = zip(self.tokens.split(rows), self.labels.split(rows), positions, strict=False)
        return [MicroBatch(*triple) for triple in triples]


class Piece(NamedTuple):
    """Consecutive tokens of a shard."""

    begin: int
    tokens: int
    continues: bool  # its document was cut before it, so its first token does not count as a label


class Row(NamedTuple):
    """The pieces of one sequence, in their order."""

    shard: Shard
    pieces: list[Piece]


class Sequences:
    """The sequences of some shards under concat, one shard after another."""

    def __init__(self, shards: list[Shard], seq_len: int) -> None:
        self._shards, self._seq_len = shards, seq_len
        self._begins = [0, *accumulate(max(0, shard.info.tokens - 1) // seq_len for shard in shards)]

    def __len__(self) -> int:
        return self._begins[-1]

    def row(self, number: int) -> Row:
        """The content of sequence `number`."""
        shard = bisect_right(self._begins, number) - 1
        first = (number - self._begins[shard]) * self._seq_len
        return Row(self._shards[shard], [Piece(first, self._seq_len + 1, False)])


class PackedSequences:
    """The sequences of some shards under best-fit, one shard after another."""

    def __init__(self, shards: list[Shard], packing: Packing) -> None:
        self._shards, self._bins = shards, [packing.of(shard) for shard in shards]
        self._begins = [0, *accumulate(map(len, self._bins))]

    def __len__(self) -> int:
        return self._begins[-1]

    def row(self, number: int) -> Row:
        """The content of sequence `number`."""
        shard = bisect_right(self._begins, number) - 1
        bins: Bins = self._bins[shard]
        return Row(self._shards[shard], [Piece(*piece) for piece in bins.pieces(number - self._begins[shard])])


def sequences_of(shards: list[Shard], seq_len: int, packing: Packing | None) -> Sequences | PackedSequences:
    """The sequences of some shards: best-fit if there is a packing, else concat."""
    return Sequences(shards, seq_len) if packing is None else PackedSequences(shards, packing)


class Reader:
    """Reads sequences of several sources in any order.

    Args:
        filler: the token that fills a sequence after its last document.
    """

    def __init__(
        self,
        sources: Sequence[Sequences | PackedSequences],
        data: DataConfig,
        filler: int,
        pinned: bool = False,
    ) -> None:
        self._sources, self._seq_len, self._filler, self._pinned = sources, data.seq_len, filler, pinned
        self._packed, self._mask = data.packing == "best-fit", data.document_mask

    def read(self, places: Places, wanted: np.ndarray) -> MicroBatch:
        """The sequences at `places[wanted]` as one batch; `places.source` indexes the sources."""
        pairs = zip(places.source[wanted].tolist(), places.sequence[wanted].tolist(), strict=True)
        rows = [self._sources[source].row(sequence) for source, sequence in pairs]
        # Announce all reads before the first, so that random reads from a cold disk overlap.
        for row in rows:
            for piece in row.pieces:
                row.shard.will_need(piece.begin, piece.tokens)
        tokens = self._tokens(rows)
        masked = any(row.shard.mask is not None for row in rows)
        labels = self._labels(rows, tokens) if self._packed or masked else tokens[:, 1:]
        positions = None
        if self._mask:
            positions = self._packed_positions(rows) if self._packed else self._positions(rows)
        return MicroBatch(tokens, labels, positions)

    def _empty(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=torch.int64, pin_memory=self._pinned)

    def _tokens(self, rows: list[Row]) -> torch.Tensor:
        tokens = self._empty(len(rows), self._seq_len + 1)
        for into, (shard, pieces) in zip(tokens.numpy(), rows, strict=True):
            end = 0
            for piece in pieces:
                begin, end = end, end + piece.tokens
                into[begin:end] = shard.tokens[piece.begin : piece.begin + piece.tokens]
            into[end:] = self._filler
        return tokens

    def _labels(self, rows: list[Row], tokens: torch.Tensor) -> torch.Tensor:
        labels = self._empty(len(rows), self._seq_len)
        labels.copy_(tokens[:, 1:])
        for into, (shard, pieces) in zip(labels.numpy(), rows, strict=True):
            end = 0
            for piece in pieces:
                if piece.continues and end:
                    into[end - 1] = IGNORE_INDEX
                if shard.mask is not None:
                    hidden = np.flatnonzero(~shard.mask.read(piece.begin, piece.tokens)) + end
                    into[hidden[hidden > 0] - 1] = IGNORE_INDEX  # a token is the label of the position before it
                end += piece.tokens
            into[end - 1 :] = IGNORE_INDEX
        return labels

    def _positions(self, rows: list[Row]) -> torch.Tensor:
        """The position of each token within its document's part of the sequence."""
        positions = self._empty(len(rows), self._seq_len)
        every = np.arange(self._seq_len)
        for into, (shard, pieces) in zip(positions.numpy(), rows, strict=True):
            begin = 0
            for end in [*shard.begins_within(pieces[0].begin, self._seq_len), self._seq_len]:
                into[begin:end] = every[: end - begin]
                begin = end
        return positions

    def _packed_positions(self, rows: list[Row]) -> torch.Tensor:
        """The same for bins. The filled end counts as a document of its own, which no other document sees."""
        positions = self._empty(len(rows), self._seq_len)
        every = np.arange(self._seq_len)
        for into, (_, pieces) in zip(positions.numpy(), rows, strict=True):
            begin = 0
            for size in [*(piece.tokens for piece in pieces), self._seq_len]:
                end = min(begin + size, self._seq_len)
                into[begin:end] = every[: end - begin]
                begin = end
        return positions
