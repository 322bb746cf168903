"""`ponder-scale phi FOLDER...`: read the runs that phi is fitted to, fit it, and print the result."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ponder_scale.checkpoint.find import read_state
from ponder_scale.checkpoint.index import step_folder
from ponder_scale.compare.phi import Fit, Point, fit
from ponder_scale.config import RunConfig
from ponder_scale.errors import CheckpointError, ConfigError
from ponder_scale.figures import count, json_text
from ponder_scale.planning.shape import model_shape
from ponder_scale.runs import records
from ponder_scale.settings import load
from ponder_scale.setup.build import configuration_from_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        kind: architecture, feedback and residual. It is empty for a run without pondering, which counts in every kind.
        data: the held-out data of its loss. Only losses on the same data can be compared.
    """

    run_dir: Path
    kind: str
    data: tuple[Any, ...]
    point: Point


def fit_runs(folders: Sequence[Path], json_file: Path | None = None) -> dict[str, Fit]:
    """Fit the law to the finished runs in these folders, for each kind of run. Prints and returns the fits.

    Args:
        folders: run folders, or folders with runs at any depth, such as the run_dir of a comparison.

    Raises:
        ConfigError: there is no finished run, the losses are of different held-out data, or the runs cannot tell phi.
    """
    runs = [run for place in _run_dirs(folders) if (run := read_run(place)) is not None]
    if not runs:
        raise ConfigError(
            f"{', '.join(map(str, folders))}: expected finished runs with a held-out loss and their last checkpoint"
        )
    for run in runs:
        if run.data != runs[0].data:
            raise ConfigError(
                f"{run.run_dir}: its held-out loss is over other data than that of {runs[0].run_dir} "
                f"({_words(run.data)}; {_words(runs[0].data)}), so the two cannot be compared; fit them separately"
            )
    kinds = sorted({run.kind for run in runs if run.kind})
    if not kinds:
        raise ConfigError(
            "none of the runs ponders, so they do not show what a pass is worth; add runs with model.pondering_steps "
            "of at least 1"
        )
    fits: dict[str, Fit] = {}
    for kind in kinds:
        try:
            fits[kind] = fit([run.point for run in runs if run.kind in ("", kind)])
        except ConfigError as error:
            raise ConfigError(f"{kind}: {error}") from error
    for kind, found in fits.items():
        print("\n".join(lines(kind, found, [run.point for run in runs if run.kind in ("", kind)])))
    if json_file is not None:
        content = {
            "fits": {kind: asdict(found) for kind, found in fits.items()},
            "runs": [{"run_dir": str(run.run_dir), "kind": run.kind, **run.point._asdict()} for run in runs],
        }
        json_file.write_text(json_text(content, 1) + "\n", encoding="utf-8")
    return fits


def lines(kind: str, found: Fit, points: Sequence[Point]) -> list[str]:
    """The lines about a fit."""
    largest = max(points, key=lambda point: point.once + point.recurrent)
    own = largest.once + largest.recurrent
    tokens = "" if found.b is None else f" + {found.b:.4g} D^-{found.beta:.4f}"
    said = [
        f"{kind}: phi = {found.phi:.3f}, 95% from {found.low:.3f} to {found.high:.3f}, over {found.runs} runs",
        f"  L = {found.e:.4f} + {found.a:.4g} (N_once + r^{found.phi:.3f} N_rec)^-{found.alpha:.4f}{tokens}",
        f"  it misses no run's loss by more than {found.worst:.2%}",
    ]
    for passes in sorted({point.passes for point in points if point.passes > 1}):
        worth = found.worth(largest.once, largest.recurrent, passes)
        said.append(
            f"  {passes} passes of {count(own)} parameters are worth {count(worth)} in one pass, "
            f"{worth / own:.2f} times as many"
        )
    return said


def read_run(run_dir: Path) -> Trained | None:
    """The measurements of a run. None, with a line in the log, if it is not finished or its checkpoint is gone."""
    config = load(RunConfig, run_dir / "config.yaml")
    evaluations = [each for each in records.read(run_dir / records.METRICS) if each["event"] == "evaluation"]
    last = evaluations[-1] if evaluations else None
    if last is None or last["step"] != config.train.steps or last["losses"][-1] is None:
        logger.info("%s is left out: its last step (%d) has no finite held-out loss", run_dir, config.train.steps)
        return None
    try:
        state = read_state(step_folder(run_dir, last["step"]), "model", "loader")
    except CheckpointError as error:
        logger.info("%s is left out: %s", run_dir, error)
        return None
    shape = model_shape(configuration_from_dict(state["model"]), config.data.seq_len)
    steps = len(last["losses"]) - 1
    tokens = last.get("trained_tokens") or config.train.sequences_until(config.train.steps) * config.data.seq_len
    recurrent = shape.parameters - shape.table_parameters
    point = Point(shape.table_parameters, recurrent, steps + 1, tokens, last["losses"][-1])
    model = config.model
    kind = f"{model.architecture}, feedback {model.feedback}, residual {model.residual}" if steps else ""
    data = (shape.vocabulary, config.data.seq_len, last["tokens"], state["loader"]["shards"])
    return Trained(run_dir, kind, data, point)


def _run_dirs(folders: Sequence[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for folder in folders:
        for metrics in sorted(folder.rglob(records.METRICS)) if folder.is_dir() else ():
            if metrics.with_name("config.yaml").is_file():
                found[metrics.parent] = None
    return list(found)


def _words(data: tuple[Any, ...]) -> str:
    vocabulary, seq_len, tokens, shards = data
    return f"{tokens:,} tokens in sequences of {seq_len:,}, vocabulary {vocabulary:,}, shards {shards[:8]}"
