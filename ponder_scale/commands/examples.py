"""One example for each command of `ponder-scale`, printed by its `--help`."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLES = {
    "init": "ponder-scale init shards/web shards/code --out recipe.yaml",
    "train": "ponder-scale train quickstart run_dir=runs/first data.sources.stdlib.path=shards/stdlib --nproc 2",
    "plan": "ponder-scale plan llama-1.4b --gpus 8,64,512 --gpu h200",
    "config": "ponder-scale config llama-1.4b --get optim",
    "submit": "ponder-scale submit recipe.yaml run_dir=/shared/runs/first --nodes 4 --time 24:00:00",
    "templates": "ponder-scale templates my-site",
    "stop": "ponder-scale stop runs/first",
    "save": "ponder-scale save runs/first",
    "requeue": "ponder-scale requeue runs/first",
    "compare": "ponder-scale compare quickstart run_dir=runs/compared --steps 1 3 --seeds 1 2 3 --with looped",
    "phi": "ponder-scale phi runs/grid --json phi.json",
    "status": "ponder-scale status runs/first",
    "report": "ponder-scale report runs/first runs/second --out report.html",
    "export": "ponder-scale export runs/first model --dtype bfloat16 --verify",
    "import-reference": "ponder-scale import-reference published model",
    "export-reference": "ponder-scale export-reference model published",
    "generate": 'ponder-scale generate model --prompt "import os" --pondering-steps 1',
    "trace": 'ponder-scale trace model --text "import os" --html trace.html',
    "evaluate ppl": "ponder-scale evaluate ppl model --data shards/web --plot losses.svg",
    "evaluate run": "ponder-scale evaluate run runs/first --data shards/web",
    "evaluate tasks": "ponder-scale evaluate tasks model --tasks lambada_openai --steps 0 1 3",
    "evaluate answers": "ponder-scale evaluate answers model --items items.jsonl --steps 0 1 2",
    "evaluate decoding": "ponder-scale evaluate decoding model --data shards/web --exit-kl 0.01",
}


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> dict[str, argparse.ArgumentParser]:
    """Each command's parser, by the command's words such as "evaluate ppl"."""
    inner: Any = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        return {" ".join(words): parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for name, command in inner[0].choices.items():
        found |= leaves(command, (*words, name))
    return found


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Append each command's example to its help."""
    for words, command in leaves(parser).items():
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.epilog = f"example:\n  {EXAMPLES[words]}"
