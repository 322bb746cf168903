"""`ponder-scale compare`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ponder_scale.commands.training import open_data
from ponder_scale.compare.baselines import EXTRAS, TIME
from ponder_scale.config import RunConfig, load_recipe
from ponder_scale.errors import ConfigError
from ponder_scale.files.places import check_folder
from ponder_scale.settings.commandline import flags, new_file, path, whole


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    widest = max(map(len, EXTRAS))
    compare = commands.add_parser(
        "compare",
        help="train a pondering model and its baselines on the same data, and report which is better",
        description="\n".join(
            ["models for --with:", *(f"  {name:<{widest}}  {about}" for name, (about, _) in EXTRAS.items())]
        ),
    )
    compare.add_argument("recipe", help="a YAML file or the name of a shipped recipe; all runs go under its run_dir")
    compare.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings for all runs; {seed} becomes the seed of the run"
    )
    compare.add_argument(
        "--steps", type=int, nargs="+", default=[], help="numbers of pondering steps to compare (default: the recipe's)"
    )
    compare.add_argument(
        "--seeds",
        type=whole(0),
        nargs="+",
        default=[],
        help="seeds to train with (default: the recipe's); use 3 or more to support a claim",
    )
    compare.add_argument(
        "--with",
        dest="extras",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"also train these models, which the list above describes: {', '.join(EXTRAS)}",
    )
    compare.add_argument(
        "--for",
        dest="own",
        nargs="+",
        action="append",
        default=[],
        metavar=("MODEL", "key=value"),
        help="settings for one model only, such as its best learning rate; repeat for more models",
    )
    compare.add_argument(
        "--answers",
        metavar="ITEMS",
        help="also ask each finished run the items of this file; see `ponder-scale evaluate answers --help`",
    )
    compare.add_argument("--answer-steps", type=whole(0), nargs="+", help="numbers of pondering steps to answer with")
    compare.add_argument("--nproc", type=whole(1), help="local ranks of each run (default: one for each GPU, or one)")
    what = compare.add_mutually_exclusive_group()
    what.add_argument(
        "--list", action="store_true", help="print the overrides of each run, for slurm/sweep.sbatch, and train nothing"
    )
    what.add_argument(
        "--only", metavar="MODEL[/seed-N]", help="train only these runs, then report on all finished ones"
    )
    what.add_argument("--report", action="store_true", help="train nothing; report on the finished runs")
    compare.set_defaults(run=_compare)
    _add_phi(commands)


def _add_phi(commands: Any) -> None:
    phi = commands.add_parser(
        "phi", help="fit how many parameters a pass is worth, from runs of several sizes and steps"
    )
    phi.add_argument("folders", nargs="+", type=path, help="run folders, or folders with runs at any depth")
    phi.add_argument(
        "--json", dest="json_file", metavar="FILE", type=new_file, help="also write the fit and the runs to this file"
    )
    phi.set_defaults(run=_phi)


def _compare(options: argparse.Namespace, _: list[str]) -> int:
    if not options.seeds and any("{seed}" in override for override in options.overrides):
        raise ConfigError("an override contains {seed}; give the seeds with --seeds")

    def configure(more: Sequence[str]) -> RunConfig:
        first = str(options.seeds[0]) if options.seeds else ""
        seed = next((override.removeprefix("seed=") for override in more if override.startswith("seed=")), first)
        return load_recipe(options.recipe, [*seeded(options.overrides, seed), *more])

    config = configure(())
    if "RANK" in os.environ:
        raise ConfigError(
            "RANK is set, but compare starts the ranks itself; run it without a launcher, or train each line of --list "
            "under the launcher"
        )
    from ponder_scale.compare.findings import read_result, time_ratio
    from ponder_scale.compare.members import plan_runs
    from ponder_scale.compare.report import write_report
    from ponder_scale.compare.run import choose, train_runs
    from ponder_scale.train.launch import default_processes

    if not options.list:
        check_folder(Path(config.run_dir), "run_dir")
    vocab_size = max(shards.manifest.vocab_size for shards in open_data(config).values())

    chosen = {"steps": options.steps, "seeds": options.seeds, "extras": options.extras, "own": _own(options.own)}
    plan = partial(plan_runs, configure, vocab_size=vocab_size, **chosen)

    def known(runs: Sequence[Any]) -> list[Any]:
        return [result for result in map(read_result, runs) if result is not None]

    def with_time(runs: list[Any]) -> list[Any]:
        """The runs of a comparison, with the runs of equal time if those are asked for and already known."""
        ratio = time_ratio(known(runs)) if TIME in options.extras else None
        return runs if ratio is None else plan(time_ratio=ratio)

    runs = with_time(plan())
    if options.list:
        print("\n".join(shlex.join([*seeded(options.overrides, run.seed), *run.overrides]) for run in runs))
        return 0
    code = 0
    if not options.report:
        alike = (options.recipe, partial(seeded, options.overrides), configure, options.nproc or default_processes())
        code = train_runs(choose(runs, options.only), *alike)
        runs, before = with_time(runs), runs
        if not code and options.only is None and len(runs) > len(before):
            code = train_runs([run for run in runs if run not in before], *alike)
    results = known(runs)
    if not results:
        raise ConfigError(f"{config.run_dir}: no run of this comparison has an evaluation yet")
    missing = [run.name for run in runs if run not in [result.run for result in results]]
    print(write_report(Path(config.run_dir), results, missing, _answers(options, results)))
    print(f"wrote {Path(config.run_dir) / 'compare.html'}, .md, .json and an SVG of each curve")
    return code


def _phi(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.compare.grid import fit_runs

    fit_runs(**flags(options))


def seeded(overrides: Sequence[str], seed: Any) -> list[str]:
    """The overrides of a run, with its seed in place of {seed}."""
    return [override.replace("{seed}", str(seed)) for override in overrides]


def _own(given: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Settings by the name of the model that they apply to."""
    own: dict[str, list[str]] = {}
    for name, *overrides in given:
        if not overrides or not all("=" in override for override in overrides):
            raise ConfigError(f"--for {' '.join([name, *overrides])}: expected a model and key=value")
        own.setdefault(name, []).extend(overrides)
    return own


def _answers(options: argparse.Namespace, results: Sequence[Any]) -> list[Any]:
    """Score the finished runs on the items, if items are given."""
    if options.answers is None:
        return []
    from ponder_scale.compare.answers import measure

    runs = [result.run for result in results if result.finished]
    steps = options.answer_steps or range(1 + max(run.member.pondering_steps for run in runs)) if runs else ()
    return [measure(run, options.answers, steps) for run in runs]
