"""A command hands what it was given to the function behind it, by the names that the function has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__
import data_pipeline.cli
import ponder_scale.cli
from benchmarks import communication, data, decode, gpu, op, planner, scale, serve, step
from data_pipeline.commands.adopt import adopt
from data_pipeline.commands.grow import append
from data_pipeline.config import BuildConfig
from ponder_scale.config import RunConfig
from ponder_scale.evaluate.answers import evaluate_answers
from ponder_scale.evaluate.decoding import measure
from ponder_scale.evaluate.generate import generate
from ponder_scale.evaluate.perplexity import evaluate, trajectory
from ponder_scale.evaluate.tasks import evaluate_tasks
from ponder_scale.evaluate.trace import trace_folder
from ponder_scale.export.reference import export_reference, import_reference
from ponder_scale.settings.commandline import flags, parse

COMMANDS: dict[str, Callable[..., Any]] = {
    "evaluate ppl x --data y --json a.json --plot a.svg --trust-remote-code": evaluate,
    "evaluate run x --data y --json a.json": trajectory,
    "evaluate tasks x --tasks piqa --steps 0 2 --json a.json": evaluate_tasks,
    "evaluate answers x --items y --json a.json": evaluate_answers,
    "evaluate decoding x --data y --json a.json": measure,
    "generate x --prompt y --pondering-steps 1 --exit-kl 0.1": generate,
    "trace x --text y --pondering-steps 1 --html a.html": trace_folder,
    "import-reference x y --license mit": import_reference,
    "export-reference x y": export_reference,
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_ponder_scale_has_the_names_of_its_function(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse(ponder_scale.cli._parser(), words.split(), RunConfig, "overrides")
    bound = inspect.signature(COMMANDS[words]).bind(**flags(options))
    assert "json_file" not in bound.arguments or str(bound.arguments["json_file"]) in ("a.json", "None")


DATA: dict[str, Callable[..., Any]] = {
    "adopt x.bin --kind raw --tokenizer y --out z --dtype uint16": adopt,
    "append x sources.web.kind=jsonl sources.web.path=y": append,
}


@pytest.mark.parametrize("words", DATA)
def test_a_command_of_ponder_data_has_the_names_of_its_function(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse(data_pipeline.cli._parser(), words.split(), BuildConfig, "settings")
    inspect.signature(DATA[words]).bind(**flags(options), command=words)


BENCHMARKS: dict[str, tuple[Any, str]] = {
    "op --vocab 100": (op, "run"),
    "step --vocab 100 --largest --policies pass": (step, "run"),
    "step --recipe llama-1.4b --batch 2": (step, "run"),
    "memory --vocab 100 --steps 0 1": (step, "memory"),
    "comm --regimes zero3_bounded --pondering-steps 1 model.hidden_size=8": (communication, "run"),
    "planner --rounds 1 --cases 1 2 --within 0.2 train.micro_batch=2": (planner, "run"),
    "decode --context 8 16 --compile": (decode, "run"),
    "scale --ranks 1 2 3 --shards 1 2": (scale, "measure"),
    "gpu --toy --minutes 7 --train 8": (gpu, "run"),
    "serve --batch 2 3 --prompt-tokens 4 --new-tokens 5 --eager": (serve, "run"),
    "data x.jsonl --tokenizer y": (data, "bench"),
}


@pytest.mark.parametrize("words", BENCHMARKS)
def test_a_benchmark_is_told_all_that_was_said_by_the_names_of_its_function(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = BENCHMARKS[words]
    takes, told = inspect.signature(getattr(module, name)), dict[str, Any]()
    monkeypatch.setattr(module, name, lambda *values, **named: told.update(takes.bind(*values, **named).arguments))
    assert benchmarks.__main__.main(words.split()) == 0
    said = {int(word) for word in words.split() if word.isdecimal()}
    work = told.get("work")
    heard = [*told.values(), *([work.batch, work.model.vocab_size] if work is not None else [])]
    assert said <= {
        number
        for value in heard
        for number in (value if isinstance(value, list) else [value])
        if isinstance(number, (int, float))
    }
    assert work is None or "--recipe" not in words or work.seq_len == 2048
