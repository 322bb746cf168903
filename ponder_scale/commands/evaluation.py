"""`ponder-scale evaluate ...`."""

from __future__ import annotations

import argparse
from typing import Any

from ponder_scale.commands.folders import add_trust
from ponder_scale.settings.commandline import flags, new_file, number, path, whole


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    evaluations = commands.add_parser("evaluate", help="held-out losses by pondering steps")
    _add_kinds(evaluations.add_subparsers(required=True, metavar="WHAT"))


def _add_kinds(kinds: Any) -> None:
    ppl = kinds.add_parser("ppl", help="held-out loss of an exported folder for 0 to k pondering steps, by source")
    ppl.add_argument("folder", type=path, help="an exported folder")
    ppl.add_argument("--steps", type=whole(0), help="k; default: what it was trained with")
    ppl.add_argument("--seq-len", type=whole(1), help="tokens a sequence; default: the model's positions")
    ppl.add_argument(
        "--document-mask", action="store_true", help="attention within documents, as data.document_mask=true trains"
    )
    ppl.set_defaults(run=_evaluate_ppl)
    run = kinds.add_parser("run", help="the same for every checkpoint that a run has kept")
    run.add_argument("run_dir", type=path, help="a run folder")
    run.set_defaults(run=_evaluate_run)
    tasks = kinds.add_parser("tasks", help="tasks of lm-evaluation-harness, for several numbers of pondering steps")
    tasks.add_argument("folder", type=path, help="an exported folder")
    tasks.add_argument("--tasks", nargs="+", default=[], help="default: the nine of the paper, or all of --include")
    tasks.add_argument("--steps", type=whole(0), nargs="+", default=(None,), help="default: what it was trained with")
    tasks.add_argument("--include", type=path, help="folder of task files with their data, for use without a network")
    tasks.add_argument("--limit", type=whole(1), help="documents of each task")
    tasks.add_argument("--batch-size", type=whole(1), default=8, help="of transformers")
    tasks.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what runs the model; vllm needs an environment of its own (docs/serving.md)",
    )
    tasks.add_argument("--json", dest="json_file", metavar="FILE", type=new_file, help="also write the metrics there")
    tasks.set_defaults(run=_evaluate_tasks)
    answers = kinds.add_parser("answers", help="how many prompts are answered right, by group and pondering steps")
    answers.add_argument("folder", type=path, help="an exported folder")
    answers.add_argument(
        "--items",
        dest="file",
        metavar="FILE",
        type=path,
        required=True,
        help='a .jsonl of {"prompt": ..., "answer": ..., "group": ...}',
    )
    answers.add_argument("--steps", type=whole(0), nargs="+", help="default: 0 to what it was trained with")
    answers.add_argument("--json", dest="json_file", metavar="FILE", type=new_file, help="also write the counts there")
    answers.set_defaults(run=_evaluate_answers)
    decoding = kinds.add_parser("decoding", help="what early exit, fewer steps and drafts save and cost")
    decoding.add_argument("folder", type=path, help="an exported folder")
    decoding.add_argument("--data", action="append", required=True, metavar="SHARDS", help="prompts are held-out texts")
    decoding.add_argument("--sequences", type=whole(1), default=8)
    decoding.add_argument("--prompt-tokens", type=whole(1), default=64)
    decoding.add_argument("--new-tokens", type=whole(1), default=64)
    decoding.add_argument("--exit-kl", type=number(least=0), nargs="+", default=[0.001, 0.01, 0.1], help="nats")
    decoding.add_argument("--json", dest="json_file", metavar="FILE", type=new_file, help="also write the table there")
    decoding.set_defaults(run=_evaluate_decoding)
    for kind in (ppl, tasks, answers, decoding):
        add_trust(kind)
    for kind in (ppl, run):
        kind.add_argument("--data", action="append", required=True, metavar="[NAME=]SHARDS", help="may be repeated")
        kind.add_argument("--sequences", type=whole(1), default=256, help="held-out sequences of each source")
        kind.add_argument("--json", dest="json_file", metavar="FILE", type=new_file, help="also write the losses there")
        kind.add_argument("--plot", dest="plot_file", metavar="FILE", type=new_file, help="also write an SVG there")


def _evaluate_ppl(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.evaluate.perplexity import evaluate

    evaluate(**_with_sources(options))


def _evaluate_run(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.evaluate.perplexity import trajectory

    trajectory(**_with_sources(options))


def _evaluate_answers(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.evaluate.answers import evaluate_answers

    evaluate_answers(**flags(options))


def _evaluate_decoding(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.evaluate.decoding import measure

    measure(**_with_sources(options))


def _evaluate_tasks(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.evaluate.tasks import evaluate_tasks

    evaluate_tasks(**flags(options))


def _with_sources(options: argparse.Namespace) -> dict[str, Any]:
    from ponder_scale.evaluate.perplexity import parse_sources

    return {**flags(options), "data": parse_sources(options.data)}
