"""`ponder-scale evaluate ...`."""

from __future__ import annotations

import argparse
from typing import Any

from ponder_scale.commands.folders import add_trust
from ponder_scale.settings.commandline import flags, new_file, number, path, whole


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    evaluations = commands.add_parser(
        "evaluate", help="measure perplexity, answers, benchmark tasks or decoding, by number of pondering steps"
    )
    kinds = evaluations.add_subparsers(required=True, metavar="WHAT")
    _add_perplexity(kinds)
    _add_tasks(kinds)
    _add_answers(kinds)
    _add_decoding(kinds)


def _add_folder(kinds: Any, name: str, help_text: str) -> Any:
    kind = kinds.add_parser(name, help=help_text)
    kind.add_argument("folder", type=path, help="an exported folder")
    add_trust(kind)
    return kind


def _add_json(kind: Any, what: str) -> None:
    kind.add_argument(
        "--json", dest="json_file", metavar="FILE", type=new_file, help=f"also write the {what} to this file"
    )


def _add_perplexity(kinds: Any) -> None:
    ppl = _add_folder(kinds, "ppl", "measure the held-out loss of an exported folder after each pass, by source")
    ppl.add_argument("--steps", type=whole(0), help="largest number of pondering steps (default: as trained)")
    ppl.add_argument("--seq-len", type=whole(1), help="tokens in a sequence (default: the longest the model accepts)")
    ppl.add_argument(
        "--document-mask", action="store_true", help="keep attention within documents, like data.document_mask=true"
    )
    ppl.set_defaults(run=_evaluate_ppl)
    run = kinds.add_parser("run", help="measure the held-out loss of every checkpoint that a run has kept")
    run.add_argument("run_dir", type=path, help="a run folder")
    run.set_defaults(run=_evaluate_run)
    for kind in (ppl, run):
        kind.add_argument(
            "--data",
            action="append",
            required=True,
            metavar="[NAME=]SHARDS",
            help="folder of shards with a held-out split; repeat for more sources",
        )
        kind.add_argument(
            "--sequences",
            type=whole(1),
            default=256,
            help="held-out sequences to read from each source (default: 256)",
        )
        _add_json(kind, "losses")
        kind.add_argument("--plot", dest="plot_file", metavar="FILE", type=new_file, help="also draw the losses as SVG")


def _add_tasks(kinds: Any) -> None:
    tasks = _add_folder(kinds, "tasks", "run tasks of lm-evaluation-harness")
    tasks.add_argument(
        "--tasks", nargs="+", default=[], help="names of tasks (default: the nine of the paper, or all in --include)"
    )
    tasks.add_argument(
        "--steps", type=whole(0), nargs="+", default=(None,), help="numbers of pondering steps (default: as trained)"
    )
    tasks.add_argument(
        "--include", type=path, metavar="DIR", help="folder of task files with their data, for use without a network"
    )
    tasks.add_argument("--limit", type=whole(1), help="documents to ask of each task (default: all)")
    tasks.add_argument(
        "--batch-size", type=whole(1), default=8, help="requests in a batch of transformers (default: 8)"
    )
    tasks.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="engine that runs the model; vllm needs an environment of its own, see docs/serving.md",
    )
    _add_json(tasks, "metrics")
    tasks.set_defaults(run=_evaluate_tasks)


def _add_answers(kinds: Any) -> None:
    answers = _add_folder(kinds, "answers", "count the prompts that a model answers right, by group")
    answers.add_argument(
        "--items",
        dest="file",
        metavar="FILE",
        type=path,
        required=True,
        help='a .jsonl file with lines {"prompt": ..., "answer": ..., "group": ...}',
    )
    answers.add_argument(
        "--steps", type=whole(0), nargs="+", help="numbers of pondering steps (default: 0 to the trained number)"
    )
    _add_json(answers, "counts")
    answers.set_defaults(run=_evaluate_answers)


def _add_decoding(kinds: Any) -> None:
    decoding = _add_folder(kinds, "decoding", "measure what early exit, fewer steps and drafts save and cost")
    decoding.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SHARDS",
        help="folder of shards, whose held-out texts are the prompts",
    )
    decoding.add_argument("--sequences", type=whole(1), default=8, help="prompts to continue (default: 8)")
    decoding.add_argument("--prompt-tokens", type=whole(1), default=64, help="tokens in a prompt (default: 64)")
    decoding.add_argument("--new-tokens", type=whole(1), default=64, help="tokens to generate (default: 64)")
    decoding.add_argument(
        "--exit-kl",
        type=number(least=0),
        nargs="+",
        default=[0.001, 0.01, 0.1],
        help="thresholds of early exit in nats, see `ponder-scale generate --help` (default: 0.001 0.01 0.1)",
    )
    _add_json(decoding, "table")
    decoding.set_defaults(run=_evaluate_decoding)


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
