"""Send the records of metrics.jsonl to Weights & Biases and TensorBoard. A run that restarts stays one run there."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Protocol

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.runs.records import Recorder
from ponder_scale.settings import to_dict

WANDB_ID = "wandb_id"
EVALUATION_STEP = "evaluation_step"
_HELD_OUT = {"tokens": "held_out_tokens", "bytes": "held_out_bytes"}


class Tracker(Protocol):
    """Receives numbers by step."""

    def log(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Receive the numbers of a step or an evaluation. Elements of lists are named `name/index`."""

    def close(self) -> None:
        """Write everything that is still buffered."""


def open_trackers(config: RunConfig, run_dir: Path, recorder: Recorder, *, start_step: int) -> list[Tracker]:
    """The trackers that the recipe asks for.

    Args:
        recorder: knows what earlier attempts have recorded.
        start_step: the step from which the run continues.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """
    trackers: list[Tracker] = []
    if config.log.wandb != "off":
        trackers.append(_Wandb(config, run_dir, recorder))
    if config.log.tensorboard:
        trackers.append(_TensorBoard(run_dir, start_step))
    return trackers


class _Wandb:
    """Weights & Biases. Its history only grows, so steps that are computed again are not sent again.

    If an attempt ends before an evaluation, the next attempt makes it, when the history may already be past that step.
    So evaluations have their own axis, `evaluation_step`, and a late one is sent with the next step of the history.
    """

    def __init__(self, config: RunConfig, run_dir: Path, recorder: Recorder) -> None:
        import wandb  # slow to import and not needed by default

        id_file = run_dir / WANDB_ID
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._reached = recorder.reached
        self._sent = {"evaluation": recorder.evaluations, "tasks": recorder.asked}
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=run_dir.resolve().name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=run_dir,
            mode="offline" if config.log.wandb == "offline" else "online",
            config=to_dict(config),
        )
        self._run.define_metric(EVALUATION_STEP)
        for names in ("losses/*", "bits_per_byte/*", "sources/*", "tasks/*"):
            self._run.define_metric(names, step_metric=EVALUATION_STEP)

    def log(self, event: str, step: int, values: dict[str, Any]) -> None:
        if event in self._sent and step not in self._sent[event]:
            self._run.log({**_numbers(event, values), EVALUATION_STEP: step}, step=max(step, self._run.step))
        elif event == "step" and step > self._reached:
            self._run.log(_numbers(event, values), step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # waits for the service process, which may not have written the last steps yet


class _TensorBoard:
    """TensorBoard. Purges steps that are computed again. These are all steps if nothing was saved yet."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard is true, but the package tensorboard is not installed; "
                "run: pip install 'ponder-scale[tensorboard]', or set it to false"
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, event: str, step: int, values: dict[str, Any]) -> None:
        for name, value in _numbers(event, values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _numbers(event: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, with names by event, so that `tokens` of an evaluation are not taken for a step's.

    Of tasks, only the scores are kept.
    """
    if event == "tasks":
        values = {"tasks": values["tasks"]}
    if event == "evaluation":
        values = {_HELD_OUT.get(name, name): value for name, value in values.items()}
    return _flat(values)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            flat |= _flat({str(index): entry for index, entry in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[prefix + name] = value
    return flat
