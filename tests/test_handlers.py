"""A command hands what it was given to the function behind it, by the names that the function has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_pipeline.cli
import ponder_scale.cli
from data_pipeline.commands.adopt import adopt
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


def test_adopt_has_the_names_of_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "adopt x.bin --kind raw --tokenizer y --out z --dtype uint16"
    options = parse(data_pipeline.cli._parser(), words.split(), BuildConfig, "settings")
    inspect.signature(adopt).bind(**flags(options), command=words)
