"""What a sequence holds, by `data.packing`, and reading many of them from memory-mapped shards.

concat: sequence j of a shard is its tokens [j L, j L + L], L = seq_len: neighbours share one token, so that each
token is predicted exactly once. Documents are cut wherever a sequence ends.

best-fit: sequence j of a shard is bin j of its packing (`ponder_scale/shards/packing.py`): whole documents, or what is
left of long ones. No label counts where the next token is not what follows in the text: at the first token of such
a rest, and in what no document fills at the end of a bin. A whole document's first token is predicted from the end
of the one before it, as under concat.

Of a shard with a mask, no label counts that is a token which does not count, wherever in a sequence it lies.
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
    """What one forward takes: B sequences of T = seq_len predicted tokens."""

    tokens: torch.Tensor  # (B, T + 1) int64; the model reads the first T
    labels: torch.Tensor  # (B, T) int64, the token that follows each; IGNORE_INDEX where it does not count
    position_ids: torch.Tensor | None  # (B, T) int64, from 0 in each document; None: not asked for

    def split(self, rows: int) -> list[MicroBatch]:
        """Micro-batches of so many rows each."""
        positions = [None] * len(self.tokens) if self.position_ids is None else self.position_ids.split(rows)
        triples = zip(self.tokens.split(rows), self.labels.split(rows), positions, strict=False)
        return [MicroBatch(*triple) for triple in triples]


class Piece(NamedTuple):
    """Consecutive tokens of a shard."""

    begin: int
    tokens: int
    continues: bool  # a document that was cut before it: no label counts at its first token


class Row(NamedTuple):
    """The pieces of one sequence, one after another from its beginning on."""

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
        """What sequence `number` holds."""
        shard = bisect_right(self._begins, number) - 1
        first = (number - self._begins[shard]) * self._seq_len
        return Row(self._shards[shard], [Piece(first, self._seq_len + 1, False)])


class PackedSequences:
    """The same under best-fit."""

    def __init__(self, shards: list[Shard], packing: Packing) -> None:
        self._shards, self._bins = shards, [packing.of(shard) for shard in shards]
        self._begins = [0, *accumulate(map(len, self._bins))]

    def __len__(self) -> int:
        return self._begins[-1]

    def row(self, number: int) -> Row:
        """What sequence `number` holds."""
        shard = bisect_right(self._begins, number) - 1
        bins: Bins = self._bins[shard]
        return Row(self._shards[shard], [Piece(*piece) for piece in bins.pieces(number - self._begins[shard])])


def sequences_of(shards: list[Shard], seq_len: int, packing: Packing | None) -> Sequences | PackedSequences:
    """The sequences of some shards, packed where there is a packing, else cut off one another."""
    return Sequences(shards, seq_len) if packing is None else PackedSequences(shards, packing)


class Reader:
    """Reads sequences of several sources in any order.

    filler: the token in what no document reaches.
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
        # All are asked for before the first is read: cold random reads then overlap instead of waiting in turn.
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
                    into[hidden[hidden > 0] - 1] = IGNORE_INDEX  # a token is the label of the place before it
                end += piece.tokens
            into[end - 1 :] = IGNORE_INDEX
        return labels

    def _positions(self, rows: list[Row]) -> torch.Tensor:
        """The position of each token read in its document's part of the sequence."""
        positions = self._empty(len(rows), self._seq_len)
        every = np.arange(self._seq_len)
        for into, (shard, pieces) in zip(positions.numpy(), rows, strict=True):
            begin = 0
            for end in [*shard.begins_within(pieces[0].begin, self._seq_len), self._seq_len]:
                into[begin:end] = every[: end - begin]
                begin = end
        return positions

    def _packed_positions(self, rows: list[Row]) -> torch.Tensor:
        """The same in bins; what is filled up counts as a document of its own, which no other sees."""
        positions = self._empty(len(rows), self._seq_len)
        every = np.arange(self._seq_len)
        for into, (_, pieces) in zip(positions.numpy(), rows, strict=True):
            begin = 0
            for size in [*(piece.tokens for piece in pieces), self._seq_len]:
                end = min(begin + size, self._seq_len)
                into[begin:end] = every[: end - begin]
                begin = end
        return positions
