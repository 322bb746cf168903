"""What `--help` says: an example for each command that it takes, and a sentence for each argument."""

from __future__ import annotations

import argparse
import shlex

import pytest

from data_pipeline import cli as data_cli
from ponder_scale import cli
from ponder_scale.commands.examples import EXAMPLES, leaves
from ponder_scale.compare.baselines import EXTRAS
from ponder_scale.config import RunConfig
from ponder_scale.settings.commandline import parse
from tests.commands import run_command


def test_each_command_has_an_example() -> None:
    assert set(leaves(cli._parser())) == set(EXAMPLES)


@pytest.mark.parametrize("command", EXAMPLES)
def test_an_example_is_what_its_command_takes(command: str) -> None:
    program, *words = shlex.split(EXAMPLES[command])
    assert program == "ponder-scale" and " ".join(words).startswith(command)
    assert parse(cli._parser(), words, RunConfig, "overrides").run


def arguments(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.Action]]:
    return [
        (words, action)
        for words, command in leaves(parser).items()
        for action in command._actions
        if not isinstance(action, argparse._HelpAction)
    ]


@pytest.mark.parametrize("parser", [cli._parser(), data_cli._parser()], ids=lambda parser: parser.prog)
def test_each_argument_says_what_it_does(parser: argparse.ArgumentParser) -> None:
    silent = [
        f"{words} {action.option_strings or action.dest}" for words, action in arguments(parser) if not action.help
    ]
    assert silent == []


def test_help_shows_the_example_and_the_shipped_recipes() -> None:
    done = run_command("ponder-scale", "train", "--help", COLUMNS="200")
    assert done.returncode == 0 and "quickstart" in done.stdout and "llama-1.4b" in done.stdout
    assert done.stdout.rstrip().endswith(EXAMPLES["train"])


def test_compare_lists_every_model_that_you_can_add() -> None:
    (added,) = [
        action for words, action in arguments(cli._parser()) if words == "compare" and "--with" in action.option_strings
    ]
    assert [name for name in EXTRAS if name not in str(added.help)] == [] and len(EXTRAS) > 5
