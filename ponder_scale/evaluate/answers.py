"""`ponder-scale evaluate answers`: count the prompts that a model answers right, by group and by pondering steps.

An item is a line of JSON, {"prompt": ..., "answer": ..., "group": ...}. The answer is right if each of its tokens is
the most probable one after the prompt and the answer so far. Greedy decoding would then write this answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ponder_scale.errors import ConfigError
from ponder_scale.figures import json_text
from ponder_scale.model.backends import IGNORE_INDEX

BATCH_TOKENS = 16384
ALL = "all"
# Two-sided 95% quantile of a normal distribution.
Z_95 = 1.959964


@dataclass(frozen=True)
class Item:
    """A prompt, its right answer, and its group."""

    prompt: str
    answer: str
    group: str


@dataclass(frozen=True)
class Score:
    """The right answers of a group. With k pondering steps, `right[k]` of `items` are right.

    Args:
        taken: mean number of steps that a token of the prompts took, where tokens may halt before k steps.
    """

    items: int
    right: dict[int, int]
    taken: dict[int, float] = field(default_factory=dict)

    def share(self, steps: int) -> float:
        """The share of right answers, between 0 and 1."""
        return self.right[steps] / self.items

    def interval(self, steps: int) -> tuple[float, float]:
        """The 95% interval of the share by Wilson (JASA 22, 1927), which also holds near 0 and 1."""
        share, n = self.share(steps), self.items
        spread = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
        middle = share + Z_95**2 / (2 * n)
        low, high = ((middle + side * spread) / (1 + Z_95**2 / n) for side in (-1, 1))
        return max(0.0, low), min(1.0, high)

    def cell(self, steps: int) -> str:
        """The share, its interval and, if tokens may halt, the steps that they took, for a table."""
        low, high = self.interval(steps)
        taken = f", {self.taken[steps]:.2f} steps" if steps in self.taken else ""
        return f"{self.share(steps):.3f} ({low:.3f} to {high:.3f}){taken}"


def read_items(path: Path) -> list[Item]:
    """The items of a .jsonl file. Raises ConfigError, with its number, for a line that is not an item."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            texts = [values["prompt"], values["answer"], values.get("group", ALL)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {_EXPECTED}; found {line[:80]}") from error
        if not all(isinstance(text, str) for text in texts) or not texts[1]:
            raise ConfigError(f"{path}, line {number}: {_EXPECTED}; found {line[:80]}")
        items.append(Item(*texts))
    if not items:
        raise ConfigError(f"{path}: no line in it; {_EXPECTED}")
    return items


_EXPECTED = 'expected {"prompt": text, "answer": text} in each line, and "group": text if there are several groups'


def score(model: Any, tokenizer: Any, items: Sequence[Item], steps: Sequence[int]) -> dict[str, Score]:
    """The right answers of each group, and of all items if there are several groups.

    Args:
        steps: numbers of pondering steps to answer with.

    Raises:
        ConfigError: an item has no token before its answer, or more tokens than the model has positions, or its answer
            begins within the last token of the prompt.
    """
    encoded = [_encode(tokenizer, item, model.config.max_position_embeddings) for item in items]
    order = sorted(range(len(items)), key=lambda i: len(encoded[i][0]))
    right = {k: torch.zeros(len(items), dtype=torch.bool) for k in steps}
    for batch in _batches(order, encoded):
        for k in steps:
            right[k][batch] = _answered(model, [encoded[i] for i in batch], k)
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.group, []).append(index)
    taken = {name: _taken(model, [encoded[i] for i in own], steps) for name, own in groups.items()}
    if len(groups) > 1:
        taken[ALL] = {k: sum(one[k] for one in taken.values()) for k in next(iter(taken.values()))}
        groups[ALL] = list(range(len(items)))
    found = {}
    for name, own in groups.items():
        tokens = sum(encoded[i][1] for i in own)
        means = {k: total / tokens for k, total in taken[name].items()}
        found[name] = Score(len(own), {k: int(right[k][own].sum()) for k in steps}, means)
    return found


def table(scores: Mapping[str, Score]) -> list[str]:
    """The lines of a Markdown table with a row for each group and a column for each number of steps.

    Each cell has the share of right answers and its 95% interval. If tokens may halt, it also has the mean number of
    steps that a token of the prompts took.
    """
    steps = list(next(iter(scores.values())).right)
    lines = [f"| group | items | {' | '.join(f'S = {k}' for k in steps)} |", "|---" * (len(steps) + 2) + "|"]
    for name, found in scores.items():
        lines.append(f"| {name} | {found.items:,} | {' | '.join(map(found.cell, steps))} |")
    return lines


def evaluate_answers(
    folder: Path,
    file: Path,
    *,
    steps: Sequence[int] | None = None,
    json_file: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Score]:
    """Print and return how many items an exported folder answers right. Raises ConfigError like `score`."""
    from ponder_scale.evaluate.generate import load_folder

    items = read_items(file)
    model, tokenizer = load_folder(folder, trust_remote_code=trust_remote_code)
    found = score(model, tokenizer, items, steps or range(model.config.pondering_steps + 1))
    print("\n".join(table(found)))
    if json_file is not None:
        json_file.write_text(json_text({"folder": str(folder), "groups": as_plain(found)}, 1) + "\n", encoding="utf-8")
    return found


def as_plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    """The scores as JSON values: items, right answers and their share by steps."""
    return {
        name: {
            "items": found.items,
            "right": {str(k): count for k, count in found.right.items()},
            "share": {str(k): found.share(k) for k in found.right},
            **({"steps taken": {str(k): mean for k, mean in found.taken.items()}} if found.taken else {}),
        }
        for name, found in scores.items()
    }


def _encode(tokenizer: Any, item: Item, most: int) -> tuple[list[int], int]:
    """The tokens of prompt and answer, and the number of tokens of the prompt."""
    whole = tokenizer(item.prompt + item.answer)["input_ids"]
    prompt = tokenizer(item.prompt)["input_ids"]
    while prompt and prompt[-1:] != whole[len(prompt) - 1 : len(prompt)] and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # some tokenizers add an end token to every text
    said = f"the item {item.prompt!r} with the answer {item.answer!r}"
    if not prompt or whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ConfigError(
            f"{said}: the answer begins within a token of the prompt, or no token comes before it; if a space "
            "separates the two, move it to the beginning of the answer"
        )
    if len(whole) - 1 > most:
        raise ConfigError(f"{said[:200]} has {len(whole):,} tokens; the model has {most:,} positions")
    return whole, len(prompt)


def _batches(order: Sequence[int], encoded: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    """Batches of items of similar length, with about `BATCH_TOKENS` tokens each."""
    batches: list[list[int]] = []
    for index in order:  # from short to long
        longest = len(encoded[index][0])
        if not batches or (len(batches[-1]) + 1) * longest > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _padded(texts: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Texts as rows, (n, T), padded at the end, which earlier tokens do not see; and where they have tokens, (n, T)."""
    lengths = torch.tensor([len(text) for text in texts], device=device)
    longest = int(lengths.max())
    rows = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    return rows, torch.arange(longest, device=device) < lengths[:, None]


@torch.no_grad()
def _taken(model: Any, encoded: Sequence[tuple[list[int], int]], steps: Sequence[int]) -> dict[int, float]:
    """The pondering steps that all tokens of the prompts took, by the number asked for. Empty without halting."""
    if getattr(model.config, "halting", "none") == "none":
        return {}
    sums = dict.fromkeys(steps, 0.0)
    for batch in _batches(range(len(encoded)), encoded):
        rows, real = _padded([encoded[i][0][: encoded[i][1]] for i in batch], model.device)
        for k in steps:
            # a token counts where it has a label, whatever the label is
            output = model(rows, shift_labels=rows.where(real, IGNORE_INDEX), skip_logits=True, pondering_steps=k)
            shares = [] if output.pass_shares is None else output.pass_shares[1:]
            sums[k] += sum(map(float, shares)) * int(real.sum())
    return sums


@torch.no_grad()
def _answered(model: Any, batch: Sequence[tuple[list[int], int]], steps: int) -> Tensor:
    """Whether each answer is right, (items,)."""
    rows, real = _padded([tokens for tokens, _ in batch], model.device)
    prompts = torch.tensor([prompt for _, prompt in batch], device=model.device)
    predicted = model(input_ids=rows[:, :-1], pondering_steps=steps).logits.argmax(-1)
    at = torch.arange(1, rows.shape[1], device=model.device)
    counts = (at >= prompts[:, None]) & real[:, 1:]
    return ((predicted == rows[:, 1:]) | ~counts).all(1).cpu()
