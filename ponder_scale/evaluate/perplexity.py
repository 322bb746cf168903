"""Measure held-out losses by pondering steps, for an exported folder or for every checkpoint that a run has kept.

One forward with k steps gives the losses of all smaller numbers of steps, too, because pass s predicts what the model
with s steps would predict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ponder_scale.checkpoint.find import check
from ponder_scale.checkpoint.index import CHECKPOINTS, saved_steps
from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.heldout import HeldOut, heldout_losses, mean_over
from ponder_scale.data.loader import heldout_batches, open_sources
from ponder_scale.data.sequences import MicroBatch
from ponder_scale.data.text_bytes import TextBytes, text_bytes
from ponder_scale.errors import CheckpointError, ConfigError, ShardError, TokenizerError
from ponder_scale.evaluate.generate import load_checkpoint, load_folder
from ponder_scale.evaluate.plot import line_chart
from ponder_scale.figures import json_text, shown
from ponder_scale.settings import expand_path
from ponder_scale.shards.format import ShardSet
from ponder_scale.shards.manifest import tokenizer_identity

MICRO_BATCH = 8
_READING = ("seq_len", "packing", "document_mask")  # settings that define the sequences of a run
ALL = "all"


@dataclass(frozen=True)
class Sweep:
    """Losses in nats by pondering steps, 0 to k.

    Args:
        trained: number of pondering steps in the model's configuration.
        sources: losses by source. If there are several, `all` has the mean over their tokens.
        no_bytes: why the bytes of the tokens are not known, or None if they are.
    """

    trained: int
    sources: dict[str, HeldOut]
    no_bytes: str | None = None

    def as_plain(self) -> dict[str, Any]:
        """The losses as JSON values."""
        sources = {
            name: {**asdict(found), "bits_per_byte": found.bits_per_byte} for name, found in self.sources.items()
        }
        return {**asdict(self), "sources": sources}


def evaluate(
    folder: Path,
    data: Mapping[str, Path],
    *,
    sequences: int,
    seq_len: int | None = None,
    steps: int | None = None,
    document_mask: bool = False,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    trust_remote_code: bool = False,
) -> Sweep:
    """Print the losses of an exported folder on the held-out split of folders of shards, and return them.

    Args:
        sequences: most sequences of each source.
        seq_len: tokens of a sequence. The default is the model's number of positions.
        steps: k. The default is the number that the model was trained with.
        document_mask: keep attention within documents. Use it for a model that was trained with data.document_mask.
        json_file, plot_file: files for the losses, and for an SVG of them.
        trust_remote_code: let a folder that is not known to be ours run its own code.

    Raises:
        TokenizerError: the shards were made with another tokenizer than the model's.
        ShardError: the shards hold nothing out.
    """
    model, _ = load_folder(folder, trust_remote_code=trust_remote_code)
    reading = {"seq_len": seq_len or model.config.max_position_embeddings, "document_mask": document_mask}
    swept = sweep(model, folder, data, reading, sequences=sequences, steps=steps)
    for name, held_out in swept.sources.items():
        _print(name, held_out, swept.trained)
    _print_no_bytes(swept)
    if json_file is not None:
        _write_json(json_file, {"folder": str(folder), "sequences": sequences, **swept.as_plain()})
    if plot_file is not None:
        series = {name: list(enumerate(held_out.losses)) for name, held_out in swept.sources.items()}
        plot_file.write_text(
            line_chart(series, "pondering steps", "held-out loss, nats"),
            encoding="utf-8",
        )
    return swept


def trajectory(
    run_dir: Path,
    data: Mapping[str, Path],
    *,
    sequences: int,
    json_file: Path | None = None,
    plot_file: Path | None = None,
) -> dict[int, Sweep]:
    """Print and return the losses of each checkpoint that the run has kept, by training step.

    Raises:
        CheckpointError: the run has kept no checkpoint, or one is not as it was saved.
    """
    folders = [folder for _, folder in sorted(saved_steps(run_dir).items())]
    if not folders:
        raise CheckpointError(f"{run_dir}: no checkpoint in {run_dir / CHECKPOINTS}; expected a run folder")
    for folder in folders:  # check all before the first is evaluated, so that a damaged one is not found after hours
        check(folder)
    swept: dict[int, Sweep] = {}
    for folder in folders:
        model, state = load_checkpoint(folder)
        reading = {key: value for key, value in state["config"]["data"].items() if key in _READING}
        swept[state["step"]] = sweep(model, folder / "tokenizer", data, reading, sequences=sequences)
    for step, found in swept.items():
        for name, held_out in found.sources.items():
            losses = "  ".join(f"{loss:.4f}" for loss in held_out.losses)
            bits = held_out.bits_per_byte
            last = "" if bits is None else f"; the last is {bits[-1]:.4f} bits per byte"
            print(f"step {step:,}  {name}  losses of 0 to {len(held_out.losses) - 1} pondering steps: {losses}{last}")
    _print_no_bytes(found)
    if json_file is not None:
        _write_json(
            json_file,
            {
                "run": str(run_dir),
                "steps": {step: found.as_plain() for step, found in swept.items()},
            },
        )
    if plot_file is not None:
        plot_file.write_text(
            line_chart(_by_pass(swept), "training step", "held-out loss, nats"),
            encoding="utf-8",
        )
    return swept


def sweep(
    model: Any,
    tokenizer: Path,
    data: Mapping[str, Path],
    reading: Mapping[str, Any],
    *,
    sequences: int,
    steps: int | None = None,
) -> Sweep:
    """The losses of a model on each source.

    Args:
        tokenizer: folder of the model's tokenizer.
        reading: fields of DataConfig that define the sequences.
        sequences, steps: as in `evaluate`.

    Raises:
        ConfigError: `steps` is negative.
        TokenizerError, ShardError: as in `evaluate`.
    """
    trained = model.config.pondering_steps
    if steps is not None and steps < 0:
        raise ConfigError(f"--steps is {steps}; expected at least 0")
    found: dict[str, HeldOut] = {}
    no_bytes: str | None = None
    for name, folder in data.items():
        config = DataConfig({name: SourceConfig(str(folder))}, **reading)
        sources = open_sources(config, "--data {}")
        check_tokenizer(sources[name], folder, tokenizer)
        batches = heldout_batches(config, sources, sequences=sequences, micro_batch=MICRO_BATCH)
        sizes: TextBytes | None = None
        try:
            sizes = text_bytes([sources[name]], tokenizer)
        except TokenizerError as error:
            no_bytes = str(error)
        held_out = _losses(model, batches, trained if steps is None else steps, sizes)
        if held_out is None:
            masked = " with a label that counts" if sources[name].manifest.masked else ""
            raise ShardError(
                f"{folder}: no held-out sequence of {config.seq_len} tokens{masked}; lower --seq-len"
                + (", or read more --sequences" if masked else "")
            )
        found[name] = held_out
        if sizes is not None and held_out.bits_per_byte is None:
            no_bytes = f"{folder}: the bytes of some held-out tokens are not known"
    return Sweep(trained, found if len(found) == 1 else {**found, ALL: mean_over(found.values())}, no_bytes)


def check_tokenizer(shards: ShardSet, folder: Path, tokenizer: Path) -> None:
    """Raise TokenizerError if the shards of `folder` were made with another tokenizer than that in `tokenizer`."""
    made_with, own = shards.manifest.tokenizer, tokenizer_identity(tokenizer) or "none"
    if own != made_with:
        raise TokenizerError(
            f"{folder}: was made with tokenizer {made_with[:12]}, but {tokenizer} has {own[:12]}; "
            "evaluate on shards that were made with the model's own tokenizer"
        )


def parse_sources(words: Iterable[str]) -> dict[str, Path]:
    """The sources of `NAME=FOLDER` or `FOLDER` by name. Without NAME, a source is named like its folder.

    Raises:
        ConfigError: two sources have the same name.
    """
    sources: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        path = Path(expand_path(folder if equals else word, "--data"))
        name = name if equals else path.resolve().name
        if name in sources or name == ALL:
            raise ConfigError(f"--data {word}: {name!r} names another source already; give it as NAME={path}")
        sources[name] = path
    return sources


def _losses(model: Any, batches: Iterable[MicroBatch], steps: int, sizes: TextBytes | None) -> HeldOut | None:
    @torch.no_grad()
    def predict(tokens: Tensor, labels: Tensor, position_ids: Tensor | None) -> object:
        return model(
            input_ids=tokens.to(model.device),
            shift_labels=labels.to(model.device),
            position_ids=None if position_ids is None else position_ids.to(model.device),
            skip_logits=True,
            pondering_steps=steps,
        )

    return heldout_losses(predict, batches, sizes=sizes)


def _by_pass(swept: Mapping[int, Sweep]) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for step, found in swept.items():
        for name, held_out in found.sources.items():
            for index, loss in enumerate(held_out.losses):
                series.setdefault(f"{name}, pass {index}", []).append((step, loss))
    return series


def _print(name: str, held_out: HeldOut, trained: int) -> None:
    bits = held_out.bits_per_byte
    size = "" if bits is None else f" of {held_out.bytes:,} bytes"
    print(
        f"{name}: held-out, {held_out.tokens:,} tokens{size}; pass s of one forward is the model with s pondering steps"
    )
    for index, (loss, value) in enumerate(zip(held_out.losses, held_out.perplexities, strict=True)):
        note = "" if index != trained else ", as trained"
        each = "" if bits is None else f", {bits[index]:.4f} bits per byte"
        print(f"  pass {index}: loss {loss:.4f}, perplexity {shown(value)}{each}{note}")


def _print_no_bytes(swept: Sweep) -> None:
    if swept.no_bytes is not None:
        print(f"no bits per byte: {swept.no_bytes}")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
