"""Run tasks of lm-evaluation-harness on the model while it trains, as `evaluate tasks` does on an export.

In the meantime every rank holds a whole copy of the weights. Each rank answers its share of the requests.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ponder_scale.config import EvaluateConfig
from ponder_scale.errors import ConfigError, UserError
from ponder_scale.harness.find import Scores, explained, find_tasks, harness, in_a_line, scores, transformers_class
from ponder_scale.harness.shared import shared_model

logger = logging.getLogger(__name__)
KEY = "evaluate.tasks"


class Tasks:
    """The tasks of a run. The constructor and the methods are collective.

    Args:
        replica: makes a whole model from the weights of this step, on this rank. Collective.
        tokenizer: folder with the tokenizer's files.
        alive: called for each batch.

    Raises:
        ConfigError: the harness or the tokenizer cannot be loaded, or a task cannot be built. Raised on all ranks.
    """

    def __init__(
        self, config: EvaluateConfig, replica: Callable[[], Any], tokenizer: Path, alive: Callable[[], None]
    ) -> None:
        self._config, self._replica, self._alive = config, replica, alive
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo") if ranks > 1 else None
        # Rank 0 goes first, so that the others find what it has downloaded and prepared.
        for turn in (rank == 0, rank != 0):
            problem = self._open(tokenizer) if turn else None
            found: list[str | None] = [problem] * ranks
            if self._group is not None:
                dist.all_gather_object(found, problem, self._group)
            if said := next(filter(None, found), None):
                raise ConfigError(said)

    def ask(self) -> tuple[Scores | None, str | None, float]:
        """Score the present weights. Returns the scores (on rank 0), the failure (on all ranks) and the seconds."""
        began, found, failure = time.monotonic(), None, None
        try:
            model = shared_model(
                self._replica(),
                self._tokenizer,
                batch_size=self._config.tasks_batch,
                group=self._group,
                alive=self._alive,
            )
            result = harness(KEY).simple_evaluate(
                model=model,
                tasks=self._names,
                task_manager=self._manager,
                limit=self._config.tasks_limit,
                log_samples=False,
            )
            found = None if result is None else scores(result)  # None except on the first rank of each node
            del model
        except Exception as error:
            logger.exception("the tasks failed")
            failure = f"{type(error).__name__}: {in_a_line(error)}"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found, failure, time.monotonic() - began

    def _open(self, tokenizer: Path) -> str | None:
        """Load the harness and build all tasks. Returns what is wrong, or None."""
        try:
            self._build(tokenizer)
        except UserError as error:
            return str(error)
        return None

    def _build(self, tokenizer: Path) -> None:
        harness(KEY)
        transformers_class(KEY)
        from lm_eval.tasks import get_task_dict
        from transformers import AutoTokenizer

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it would log each of its actions at each evaluation
        include = None if self._config.tasks_include is None else Path(self._config.tasks_include)
        if include is not None and not include.is_dir():
            raise ConfigError(f"{KEY}_include is {include}, which is not a folder; name a folder of task files")
        self._names, self._manager = find_tasks(self._config.tasks, include, key=KEY)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{KEY}: the tokenizer in {tokenizer} cannot be loaded ({in_a_line(error)})") from error
        try:
            with explained(KEY, f"{KEY}_include=FOLDER"):
                for task in _tasks_in(get_task_dict(self._names, self._manager)):
                    if task.get_config("num_fewshot") is None:
                        task.set_config(key="num_fewshot", value=0)
                    task.set_fewshot_seed(seed=0)
                    task.build_all_requests(limit=1, rank=0, world_size=1)
        except UserError:
            raise
        except Exception as error:  # task files and their code come from others and may raise anything
            names = ", ".join(self._names)
            raise ConfigError(f"{KEY}: {names} cannot be built: {type(error).__name__}: {in_a_line(error)}") from error


def _tasks_in(found: dict[Any, Any]) -> list[Any]:
    """The tasks in the harness's answer for some names, where groups may be nested."""
    return [task for value in found.values() for task in (_tasks_in(value) if isinstance(value, dict) else [value])]
