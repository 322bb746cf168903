"""Count what the models of a comparison answer right, by group and pondering steps.

Each run is measured once. The result is kept in its folder.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ponder_scale.checkpoint.find import find
from ponder_scale.checkpoint.index import TOKENIZER, saved_steps
from ponder_scale.compare.members import Member, Run
from ponder_scale.evaluate.plot import bar_chart
from ponder_scale.figures import json_text
from ponder_scale.files.write import hash_file, writing

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Answers:
    """The items and right answers of each group, by pondering steps, of one run."""

    run: Run
    groups: dict[str, dict[str, Any]]

    def share(self, group: str, steps: int) -> float:
        """The share of right answers, between 0 and 1."""
        return self.groups[group]["share"][str(steps)]


def measure(run: Run, items: str, steps: Sequence[int]) -> Answers:
    """Ask the newest checkpoint of a run, unless it has been asked the same items before.

    Args:
        items: path of the items. `{seed}` in it stands for the run's seed.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        ConfigError: the items cannot be asked.
    """
    file, kept = Path(items.replace("{seed}", str(run.seed))), run.run_dir / ANSWERS
    saved = saved_steps(run.run_dir)
    asked = {
        "checkpoint": saved[max(saved)].name if saved else "",
        "items": hash_file(file) if file.is_file() else "",
        "steps": list(steps),
    }
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["asked"] == asked:
            return Answers(run, before["groups"])
    folder = find(run.run_dir)  # verifies every byte
    asked["checkpoint"] = folder.name
    from transformers import AutoTokenizer

    from ponder_scale.evaluate.answers import as_plain, read_items, score
    from ponder_scale.evaluate.generate import load_checkpoint

    questions = read_items(file)
    model, _ = load_checkpoint(folder)
    groups = as_plain(score(model, AutoTokenizer.from_pretrained(folder / TOKENIZER), questions, steps))
    # Processes that train other runs of the comparison may read or write this file at the same time.
    with writing(kept, temporary=kept.with_name(f".{ANSWERS}.{os.getpid()}.tmp")) as stream:
        stream.write((json_text({"asked": asked, "groups": groups}, 1) + "\n").encode())
    return Answers(run, groups)


def table(found: Sequence[Answers]) -> list[list[str]]:
    """The rows of a table, the first one its heads. There is a row for each model and number of steps.

    Each cell has the share of right answers of a group: the mean, and the share of every seed. The head of a group has
    its number of items, and half of the widest 95% interval that a share of so many items has (binomial, at 1/2).
    """
    names = _groups(found)
    rows = [["model", "asked with", *(f"{name} ({_items(found, name)})" for name in names)]]
    for member in _members(found):
        own = [answers for answers in found if answers.run.member == member]
        for steps in own[0].groups[names[0]]["share"]:
            shares = [[answers.share(name, steps) for answers in own] for name in names]
            cells = (f"{statistics.fmean(each):.3f} ({' '.join(f'{share:.2f}' for share in each)})" for each in shares)
            rows.append([member.name, f"S = {steps}", *cells])
    return rows


def chart(found: Sequence[Answers]) -> str:
    """An SVG with a bar for each group and model, and a dot for each seed.

    In each group a model has the number of steps with which its mean is best, so no baseline suffers from the choice.
    """
    names = _groups(found)
    shares: dict[str, list[list[float]]] = {}
    for member in _members(found):
        own = [answers for answers in found if answers.run.member == member]
        asked = [int(steps) for steps in own[0].groups[names[0]]["share"]]
        by_steps = ([[answers.share(name, steps) for answers in own] for steps in asked] for name in names)
        shares[member.name] = [max(each, key=statistics.fmean) for each in by_steps]
    return bar_chart(names, shares, "share answered right, with the best S")


def _groups(found: Sequence[Answers]) -> list[str]:
    """The groups that the items of every seed have."""
    return [name for name in found[0].groups if all(name in answers.groups for answers in found)]


def _items(found: Sequence[Answers], name: str) -> str:
    counts = sorted({answers.groups[name]["items"] for answers in found})
    said = f"{counts[0]:,} items" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} items"
    return f"{said}, +- {0.98 / math.sqrt(counts[0]):.3f}"


def _members(found: Sequence[Answers]) -> list[Member]:
    return list({answers.run.member.name: answers.run.member for answers in found}.values())
