"""Manage runs on a cluster: `submit`, `templates`, `stop`, `save` and `requeue`. Slurm templates call `config`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ponder_scale.commands.training import add_recipe
from ponder_scale.config import RunConfig, load_recipe
from ponder_scale.errors import ConfigError
from ponder_scale.files.places import check_folder
from ponder_scale.files.shipped import SLURM
from ponder_scale.planning.hardware import TABLE, read_hardware
from ponder_scale.settings import flat, meant, to_dict, to_yaml
from ponder_scale.settings.commandline import new_folder, number, path, whole


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    _add_config(commands)
    _add_submit(commands)
    templates = commands.add_parser(
        "templates", help="copy the Slurm files to a folder where you can edit them for your site"
    )
    templates.add_argument("folder", type=new_folder, metavar="DIR", help="folder to copy the files to")
    templates.add_argument("--overwrite", action="store_true", help="replace files that exist and differ")
    templates.set_defaults(run=_templates)
    for name, help_text, action in (
        ("stop", "save a checkpoint and end a run", _stop),
        ("save", "save a checkpoint at the next step and train on", _save),
        ("requeue", "save a checkpoint and put the job back in the queue", _requeue),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("run_dir", type=path, metavar="RUN", help="run folder")
        command.set_defaults(run=action)
        if name == "stop":
            command.add_argument("--now", action="store_true", help="stop at once, without a checkpoint")


def _add_config(commands: Any) -> None:
    config = commands.add_parser("config", help="print the resolved configuration of a run")
    add_recipe(config)
    config.add_argument(
        "--get", metavar="KEY", help="print the value of this key; for a group, a line key=value for each key in it"
    )
    config.set_defaults(run=_config)


def _add_submit(commands: Any) -> None:
    submit = commands.add_parser(
        "submit", help="check a run, print its plan and submit it to Slurm with a snapshot of its code"
    )
    add_recipe(submit)
    submit.add_argument("--nodes", type=whole(1), default=1, help="number of nodes to train on (default: 1)")
    submit.add_argument(
        "--gpus-per-node", type=whole(1), default=8, help="GPUs on each node, one rank for each (default: 8)"
    )
    submit.add_argument(
        "--spares", type=whole(0), default=0, help="extra nodes in the job that replace failed ones (default: 0)"
    )
    submit.add_argument("--time", metavar="LIMIT", help="wall-clock limit of each job, in the format of sbatch")
    submit.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="pass one more option to sbatch, such as --sbatch=--qos=high; repeat for more",
    )
    submit.add_argument(
        "--gpu", choices=sorted(TABLE), default="h100", help="device that the plan assumes (default: h100)"
    )
    submit.add_argument(
        "--hardware", type=path, metavar="FILE", help="measured figures for the plan, written by `plan --calibrate`"
    )
    submit.add_argument(
        "--mfu", type=number(above=0, most=1), help="share of the peak FLOP/s that your runs reach, for the plan"
    )
    submit.add_argument(
        "--templates",
        type=path,
        metavar="DIR",
        help="folder with the Slurm files of your site (default: the shipped ones)",
    )
    only = submit.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="print the plan and the command, and write nothing")
    only.add_argument(
        "--test-only", action="store_true", help="ask Slurm whether and when the job could run, and submit nothing"
    )
    submit.set_defaults(run=_submit)


def _config(options: argparse.Namespace, _: list[str]) -> None:
    config = load_recipe(options.recipe, options.overrides)
    if options.get is None:
        print(to_yaml(config), end="")
        return
    lines = flat(to_dict(config), options.get)
    if not lines:
        near = meant(RunConfig, options.get)
        raise ConfigError(f"--get {options.get}: a run has no such key" + (f"; did you mean {near}?" if near else ""))
    for key, value in lines.items():
        print(value if key == options.get else f"{key}={value}")


def _submit(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.commands.training import check_run, print_plan
    from ponder_scale.runs.submit import Resources, Submission
    from ponder_scale.train.zero.deepspeed_config import find_sharding

    config = load_recipe(options.recipe, options.overrides)
    resources = Resources(options.nodes, options.gpus_per_node, options.spares, options.time, tuple(options.sbatch))
    if not (options.dry_run or options.test_only):
        check_folder(Path(config.run_dir), "run_dir")
    templates = SLURM if options.templates is None else options.templates.absolute()
    submission = Submission(config, find_sharding(config.train.deepspeed), resources, templates)
    submission.check_time()
    if not (options.dry_run or options.test_only):
        submission.check_free()  # first, because a plan takes seconds
    check_run(config, resources.ranks)
    hardware = TABLE[options.gpu] if options.hardware is None else read_hardware(options.hardware)
    per_node = resources.gpus_per_node
    print_plan(config, resources.ranks, per_node=per_node, hardware=hardware, utilization=options.mfu)
    if options.dry_run:
        print(submission.describe())
    elif options.test_only:
        print(submission.ask())
    else:
        print(submission.submit())


def _templates(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.runs.templates import write_templates

    print(write_templates(options.folder, overwrite=options.overwrite))


def _stop(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.runs.submit import stop

    print(stop(options.run_dir, save=not options.now))


def _save(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.runs.submit import save

    print(save(options.run_dir))


def _requeue(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.runs.submit import requeue

    print(requeue(options.run_dir))
