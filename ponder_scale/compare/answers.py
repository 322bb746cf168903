"""What the models of a comparison answer right, by group and pondering steps: measured once a run, kept beside it."""

from __future__ import annotations

import json
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
    """Of one run: items and right answers of each group, by pondering steps."""

    run: Run
    groups: dict[str, dict[str, Any]]

    def share(self, group: str, steps: int) -> float:
        """Between 0 and 1."""
        return self.groups[group]["share"][str(steps)]


def measure(run: Run, items: str, steps: Sequence[int]) -> Answers:
    """Ask the newest checkpoint of a run, unless that was asked the same before.

    Args:
        items: the file of the items; `{seed}` in it is the run's seed.

    Raises:
        CheckpointError, ConfigError: no whole checkpoint; items that cannot be asked.
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
    folder = find(run.run_dir)  # reads every byte of it
    asked["checkpoint"] = folder.name
    from transformers import AutoTokenizer

    from ponder_scale.evaluate.answers import as_plain, read_items, score
    from ponder_scale.evaluate.generate import load_checkpoint

    questions = read_items(file)
    model, _ = load_checkpoint(folder)
    groups = as_plain(score(model, AutoTokenizer.from_pretrained(folder / TOKENIZER), questions, steps))
    # processes that train other runs of the comparison may look at it, or write it, at the same time
    with writing(kept, temporary=kept.with_name(f".{ANSWERS}.{os.getpid()}.tmp")) as stream:
        stream.write((json_text({"asked": asked, "groups": groups}, 1) + "\n").encode())
    return Answers(run, groups)


def table(found: Sequence[Answers]) -> list[list[str]]:
    """Rows, the first one the heads: a model asked with so many steps, its share of each group, mean and every seed."""
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
    """An SVG: for each group a bar of each model, asked with the steps of its training; a dot for each seed."""
    names = _groups(found)
    shares: dict[str, list[list[float]]] = {}
    for member in _members(found):
        own = [answers for answers in found if answers.run.member == member]
        asked = map(int, own[0].groups[names[0]]["share"])
        steps = min(asked, key=lambda steps, trained=member.pondering_steps: abs(steps - trained))  # type: ignore[misc]
        shares[member.name] = [[answers.share(name, steps) for answers in own] for name in names]
    return bar_chart(names, shares, "share answered right")


def _groups(found: Sequence[Answers]) -> list[str]:
    """Those that the items of every seed have."""
    return [name for name in found[0].groups if all(name in answers.groups for answers in found)]


def _items(found: Sequence[Answers], name: str) -> str:
    counts = sorted({answers.groups[name]["items"] for answers in found})
    return f"{counts[0]:,} items" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} items"


def _members(found: Sequence[Answers]) -> list[Member]:
    return list({answers.run.member.name: answers.run.member for answers in found}.values())
