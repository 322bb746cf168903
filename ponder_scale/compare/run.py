"""Train the runs of a comparison one after another. Finished runs are skipped, and interrupted ones are resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ponder_scale import settings
from ponder_scale.checkpoint.index import step_folder
from ponder_scale.compare.findings import read_result
from ponder_scale.compare.members import LoadConfig, Run
from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.train.launch import launch

logger = logging.getLogger(__name__)


def choose(runs: Sequence[Run], only: str | None) -> list[Run]:
    """The runs that `--only` names: MEMBER for all its seeds, or MEMBER/seed-N. Raises ConfigError if there is none."""
    chosen = [run for run in runs if only in (None, run.name, run.member.name)]
    if not chosen:
        raise ConfigError(f"--only {only}: expected one of {', '.join(run.name for run in runs)}")
    return chosen


def train_runs(
    runs: Sequence[Run], recipe: str, overrides: Callable[[int], Sequence[str]], load: LoadConfig, processes: int
) -> int:
    """Train the runs that are not finished. Returns the exit code of the first run that did not end well, or 0.

    Args:
        overrides: takes a seed and returns the overrides of all its runs.

    Raises:
        ConfigError: the folder of a run holds a run with other settings.
    """
    for run in runs:
        _check_same(run, load(run.overrides))
    for number, run in enumerate(runs, 1):
        if is_finished(run):
            logger.info("== %d/%d %s is finished", number, len(runs), run.name)
            continue
        logger.info("== %d/%d %s: %s", number, len(runs), run.name, run.member.about)
        code = launch(["train", recipe, *overrides(run.seed), *run.overrides], processes)
        if code:
            return code
    return 0


def is_finished(run: Run) -> bool:
    """Whether the run's last step is evaluated and saved."""
    result = read_result(run)
    saved = step_folder(run.run_dir, run.member.steps).is_dir()
    return saved and result is not None and result.finished


def _check_same(run: Run, config: RunConfig) -> None:
    path = run.run_dir / "config.yaml"
    if not path.is_file():
        return
    saved, wanted = (settings.flat(settings.to_dict(each)) for each in (settings.load(RunConfig, path), config))
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key) and not key.startswith(("log.", "checkpoint.")):
            raise ConfigError(
                f"{run.run_dir}: was trained with {key} {saved.get(key)}, but this comparison has {wanted.get(key)}; "
                "give the comparison another run_dir, or the same settings"
            )
