"""Import the harness, find its tasks by name, and explain its failures."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ponder_scale.errors import ConfigError

Scores = dict[str, dict[str, float]]  # by task and metric


def harness(what: str = "evaluate tasks") -> Any:
    """Import the harness. Raises ConfigError if it is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(f"{what} needs lm-eval ({error}); run: pip install 'ponder-scale[eval]'") from error
    return lm_eval


def transformers_class(what: str = "evaluate tasks") -> Any:
    """The harness's model class for transformers. Raises ConfigError if a package is missing."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:  # packages that the harness does not install itself
        raise ConfigError(f"{what} needs {error.name} ({error}); run: pip install 'ponder-scale[eval]'") from error
    return HFLM


def find_tasks(
    tasks: Sequence[str], include: Path | None, default: Sequence[str] = (), key: str = "--tasks"
) -> tuple[list[str], Any]:
    """The names of the tasks to run, and the harness's manager that knows them.

    Args:
        tasks: names of tasks. If empty, all tasks of `include`, or `default` if it has none.
        include: a folder with more task files.
        key: the setting that named the tasks, for messages.

    Raises:
        ConfigError: the harness does not know a name.
    """
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=str(include), include_defaults=False).all_tasks if include is not None else []
    names = list(tasks or own or default)
    # Reading the thousands of tasks that come with the harness takes seconds.
    path, needed = None if include is None else str(include), not set(names) <= set(own)
    manager = TaskManager(include_path=path, include_defaults=needed)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        known = f"expected tasks of {include} ({', '.join(own)}) or" if include else "expected tasks"
        raise ConfigError(
            f"{key}: the harness does not know {', '.join(unknown)}; {known} of the list of `lm_eval ls tasks`"
        )
    return names, manager


@contextmanager
def explained(key: str = "--tasks", include: str = "--include FOLDER") -> Iterator[None]:
    """Raise ConfigError if the harness cannot get the data of a task, whichever error its libraries raise.

    Args:
        key: the setting that named the tasks.
        include: how to name a folder of task files, for the remedy in the message.
    """
    # The hub's client logs each of its retries, for half a minute.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == "download" and frame.f_globals["__name__"].startswith("lm_eval."):
                task = frame.f_locals["self"].config.task
                raise ConfigError(
                    f"{key}: the data of {task} cannot be read ({in_a_line(error)}); without a network, name a folder "
                    f"of task files with their data: {include}"
                ) from error
        raise


def in_a_line(error: Exception) -> str:
    """The first non-empty line of an error's text, or the error's type."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (said or type(error).__name__)[:200]


def scores(result: Mapping[str, Any]) -> Scores:
    """The numbers in a result of the harness, by task and metric."""
    return {
        task: {key: float(value) for key, value in metrics.items() if isinstance(value, float)}  # some are numpy's
        for task, metrics in result["results"].items()
    }
