"""The knobs of the data that a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ponder_scale.errors import ConfigError
from ponder_scale.settings import MISSING, knob

from .bounds import MOST_POSITIONS, MOST_TOKENS, MOST_WEIGHT


@dataclass(frozen=True)
class SourceConfig:
    """One folder of shards in the mixture."""

    path: str = knob(MISSING, "Folder of shards. It holds manifest.json.", path=True)
    weight: float = knob(1.0, "Share of the sequences, relative to the other sources.", above=0, max=MOST_WEIGHT)
    max_epochs: float | None = knob(
        None, "Read the source at most this many times. After that the other sources take its share.", above=0, max=1e6
    )


@dataclass(frozen=True)
class PhaseConfig:
    """A part of training with its own mixture, for a curriculum or for annealing at the end."""

    tokens: float | None = knob(
        None,
        "Length of the phase. Only the last phase may have `null`, which means until the end of the run.",
        unit="tokens",
        above=0,
        max=MOST_TOKENS,
    )
    weights: dict[str, float] = knob(
        {},
        "Weight of each source in this phase. A source that you leave out is not read. {} uses the weights of "
        "`data.sources`.",
        min=0,
        max=MOST_WEIGHT,
    )


@dataclass(frozen=True)
class DataConfig:
    """The data to read, and the pieces to read it in."""

    sources: dict[str, SourceConfig] = knob({}, "The mixture: a name for each folder of shards.")
    seq_len: int = knob(
        1024,
        "Predicted tokens in a sequence. The loader reads one token more, because the last one needs a label.",
        unit="tokens",
        min=2,
        max=MOST_POSITIONS,
    )
    phases: list[PhaseConfig] = knob(
        [], "Mixtures that follow each other, for a curriculum or an annealing. [] always trains on `data.sources`."
    )
    skip: list[list[int]] = knob(
        [], "Ranges [first, end) of sequence numbers to leave out, such as those of a loss spike.", min=0, max=2**53
    )
    packing: Literal["concat", "best-fit"] = knob(
        "concat",
        "How documents become sequences. concat: all documents are joined and cut every `seq_len` tokens. best-fit: a "
        "document that fits into a sequence is never cut. best-fit needs the bins that `ponder-data pack` makes.",
    )
    document_mask: bool = knob(False, "Keep attention within each document and start its positions at 0.")

    def __post_init__(self) -> None:
        for name in self.sources:
            if not name or "/" in name or not name.isprintable():
                raise ConfigError(
                    f"data.sources has the name {name!r}; expected one line without /, which separates the name of a "
                    f"folder from that of a source in it; use letters, digits, - and _"
                )
        for number, phase in enumerate(self.phases[:-1]):
            if phase.tokens is None:
                raise ConfigError(f"data.phases.{number}.tokens is null; only the last phase may last until the end")
        for stretch in self.skip:
            if len(stretch) != 2 or not 0 <= stretch[0] < stretch[1]:
                raise ConfigError(f"data.skip has {stretch}; expected [first, end] with 0 <= first < end")
