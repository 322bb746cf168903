"""Weights & Biases and TensorBoard, fed what metrics.jsonl gets. A run stays one run there however often it starts."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Protocol

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import to_dict

WANDB_ID = "wandb_id"


class Tracker(Protocol):
    """Takes numbers by step."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Take the numbers of a step; lists become `name/index`."""

    def close(self) -> None:
        """Write out what is left."""


def open_trackers(config: RunConfig, run_dir: Path, *, start_step: int, reached: int) -> list[Tracker]:
    """What the run asks for.

    Args:
        start_step: the step from which the run goes on.
        reached: the last step that an earlier attempt has logged.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """
    trackers: list[Tracker] = []
    if config.log.wandb != "off":
        trackers.append(_Wandb(config, run_dir, reached))
    if config.log.tensorboard:
        trackers.append(_TensorBoard(run_dir, start_step))
    return trackers


class _Wandb:
    """Its history only grows: steps that are computed again are not sent again."""

    def __init__(self, config: RunConfig, run_dir: Path, reached: int) -> None:
        import wandb  # slow to import and not needed by default

        id_file = run_dir / WANDB_ID
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._reached = reached
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=run_dir.resolve().name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=run_dir,
            mode="offline" if config.log.wandb == "offline" else "online",
            config=to_dict(config),
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        if step > self._reached:
            self._run.log(_flat(values), step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # waits for its service process, which may not have written the last steps yet


class _TensorBoard:
    """Takes back what it has of the steps that are computed again."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard is true and the package tensorboard is not installed; "
                "pip install 'ponder-scale[tensorboard]', or set it to false"
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in _flat(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


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
