"""Run lm-evaluation-harness on an exported folder, for several numbers of pondering steps.

The model runs in transformers, or in vLLM with the plugin of `serve`. The harness has its own class for each.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ponder_scale.errors import CheckpointError, ConfigError
from ponder_scale.evaluate.generate import load_folder
from ponder_scale.evaluate.trust import installed_configuration
from ponder_scale.figures import json_text
from ponder_scale.harness.find import explained, find_tasks, harness, scores, transformers_class

PAPER_TASKS = (
    *("lambada_openai", "lambada_standard", "arc_easy", "arc_challenge", "winogrande"),
    *("piqa", "hellaswag", "sciq", "race"),
)
ENGINES = ("transformers", "vllm")


def evaluate_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    steps: Sequence[int | None] = (None,),
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    json_file: Path | None = None,
    trust_remote_code: bool = False,
    engine: str = "transformers",
) -> dict[str, dict[str, dict[str, float]]]:
    """Print and return the metrics of each task as {steps: {task: {metric: value}}}. "trained" stands for None.

    Args:
        tasks: names that the harness knows. Without any, the nine tasks of the paper are run.
        steps: numbers of pondering steps at inference. None is the number that the model was trained with.
        include: folder of your own task files. They replace the harness's tasks of the same names. The harness's own
            tasks load their data from the network, unless they have been downloaded before. A task file may name
            Python functions, which the harness runs.
        limit: documents of each task. None means all.
        trust_remote_code: let a folder that is not known to be ours run its own code, in transformers.
        engine: one of `ENGINES`. vLLM chooses its own batches.

    Raises:
        ConfigError: the harness or the engine is not installed, or the harness does not know a task or cannot get its
            data.
        CheckpointError: `folder` is not an exported folder.
    """
    library = harness()
    _check_engine(engine, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; expected a folder made by `ponder-scale export`")
    if not trust_remote_code:
        installed_configuration(folder)  # refuse a bad folder before the harness reads its thousands of files
    names, manager = find_tasks(tasks, include, PAPER_TASKS)
    if engine == "vllm":
        models = _in_vllm(folder, steps)
    else:
        models = _in_transformers(folder, steps, batch_size, trust_remote_code)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for number, model in zip(steps, models, strict=True):
        with explained():
            result = library.simple_evaluate(model=model, tasks=names, task_manager=manager, limit=limit)
        found["trained" if number is None else str(number)] = scores(result)
    print(as_table(found))
    if json_file is not None:
        json_file.write_text(json_text({"folder": str(folder), "steps": found}, indent=1) + "\n", encoding="utf-8")
    return found


def _check_engine(engine: str, trust_remote_code: bool) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"--engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm needs vLLM, which is not installed here; give vLLM an environment of its own, since it pins "
            "versions, and run `pip install --no-deps ponder-scale` there (docs/serving.md), or leave --engine out"
        )
    if trust_remote_code:
        raise ConfigError(
            "--trust-remote-code has no effect with --engine vllm, which runs the plugin and no code of a folder; "
            "leave one of the two out"
        )


def _in_transformers(
    folder: Path, steps: Sequence[int | None], batch_size: int, trust_remote_code: bool
) -> Iterator[Any]:
    """The harness's model for each number of steps. It is loaded once, and its configuration changes."""
    model_class = transformers_class()
    loaded, tokenizer = load_folder(folder, trust_remote_code=trust_remote_code)
    trained = loaded.config.pondering_steps
    for number in steps:
        loaded.config.pondering_steps = trained if number is None else number
        yield model_class(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)


def _in_vllm(folder: Path, steps: Sequence[int | None]) -> Iterator[Any]:
    """The harness's model for each number of steps, each in a new engine.

    What an engine compiles and caches is right for one number of steps only.
    """
    from lm_eval.models.vllm_causallms import VLLM

    dtype = installed_configuration(folder).dtype
    for number in steps:
        # With "auto", vLLM would turn fp32 into bf16.
        options: dict[str, Any] = {"dtype": "auto" if dtype is None else str(dtype).removeprefix("torch.")}
        if number is not None:
            options["hf_overrides"] = {"pondering_steps": number}
        model: Any = VLLM(pretrained=str(folder), batch_size="auto", **options)
        try:
            yield model
        finally:
            model.model.llm_engine.engine_core.shutdown()
            del model
            gc.collect()


def as_table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table as text, with a row for each task and metric and a column for each number of pondering steps."""
    rows = [(task, metric) for task, metrics in next(iter(found.values())).items() for metric in metrics]
    width = max(len(f"{task} {metric}") for task, metric in rows)
    lines = [f"{'pondering steps':{width}}" + "".join(f"{name:>10}" for name in found)]
    for task, metric in rows:
        values = "".join(f"{results[task][metric]:10.4f}" for results in found.values())
        lines.append(f"{f'{task} {metric}':{width}}{values}")
    return "\n".join(lines)
