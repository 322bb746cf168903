"""How a pondering model composes two facts: python mechanism.py FOLDER WORLD

A composition `h r1 r2` is answered by way of the entity that `h r1` leads to, the bridge, which the prompt does not
name. This looks at the position of r1, for each group of two hops in WORLD/items.jsonl:

    bridge       how often pass 0 says the bridge there, and the probability that it gives it
    answers      how often the last token is right without pondering, and with one step
    follows      the pondering embedding at r1 is exchanged for that of another entity: how often the answer becomes
                 the one that r2 leads to from there, and how often it stays
    r1 alone     answers where only r1's pondering embedding is fed back
    without r1   answers where all but r1's is fed back

The exchange is an intervention as in arXiv 2106.02997: what the model does with the fed-back embedding is measured by
changing it and nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ponder_scale.evaluate.generate import load_folder
from ponder_scale.model.pondering_embedding import pondering_embedding
from ponder_scale.model.readout import Ops

COLUMNS = ("items", "bridge", "p(bridge)", "S = 0", "S = 1", "follows", "stays", "r1 alone", "without r1")
R1 = 1  # the position of the first relation

Edit = Callable[[Tensor], Tensor]


def edited(edit: Edit) -> Ops:
    """The model's own op, with what it feeds back (B, T, D) changed."""

    def op(*arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        mixed, statistics = pondering_embedding(*arguments, **options)
        return edit(mixed), statistics

    return Ops(pondering_embedding=op)


def kept(*positions: int) -> Edit:
    """Nothing is fed back but at these positions."""

    def edit(mixed: Tensor) -> Tensor:
        only = torch.zeros_like(mixed)
        only[:, list(positions)] = mixed[:, list(positions)]
        return only

    return edit


def exchanged(embeddings: Tensor) -> Edit:
    """At r1 these (B, D) are fed back, and elsewhere what was."""

    def edit(mixed: Tensor) -> Tensor:
        other = mixed.clone()
        other[:, R1] = embeddings.to(mixed)
        return other

    return edit


def read_world(folder: Path) -> tuple[dict[tuple[str, str], str], dict[str, list[list[str]]]]:
    """Where each fact leads, and the compositions of two by their group, as words."""
    facts = {}
    for line in (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines():
        h, r, to = json.loads(line)["text"].split()
        facts[h, r] = to
    groups: dict[str, list[list[str]]] = {}
    for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if item["group"].startswith("two hops"):
            groups.setdefault(item["group"], []).append(item["prompt"].split())
    return facts, groups


@torch.no_grad()
def measure(
    model: Any, number: Callable[[str], int], facts: dict[tuple[str, str], str], asked: list[list[str]]
) -> dict[str, float]:
    """The columns, of one group.

    Args:
        number: the token of a word.
        asked: compositions, [h, r1, r2] each.
    """
    entities = sorted({h for h, _ in facts})
    bridges = [facts[h, r1] for h, r1, _ in asked]
    # another entity for each: as far from the bridge in the list as the row is in the group, and never none
    others = [
        entities[(entities.index(bridge) + 1 + row % (len(entities) - 1)) % len(entities)]
        for row, bridge in enumerate(bridges)
    ]
    table = model.get_input_embeddings().weight
    ids = torch.tensor([[number(word) for word in words] for words in asked], device=table.device)
    answers, leading = (
        ids.new_tensor([number(facts[entity, words[2]]) for entity, words in zip(chosen, asked, strict=True)])
        for chosen in (bridges, others)
    )
    there = ids.new_tensor([number(bridge) for bridge in bridges])
    scale = model.config.hidden_size**0.5 if model.config.scale_embeds else 1.0

    def said(edit: Edit | None = None, steps: int = 1) -> Tensor:
        ops = None if edit is None else edited(edit)
        return model(ids, pondering_steps=steps, ops=ops).logits  # type: ignore[no-any-return]

    def share(logits: Tensor, right: Tensor, rows: Tensor | slice = slice(None)) -> float:
        return (logits[rows, -1].argmax(-1) == right[rows]).float().mean().item()

    first = said(steps=0)
    swapped = said(exchanged(scale * table[[number(other) for other in others]]))
    tells = answers != leading  # elsewhere both entities lead to the same
    values = (
        len(asked),
        (first[:, R1].argmax(-1) == there).float().mean().item(),
        first[:, R1].softmax(-1).gather(1, there[:, None]).mean().item(),
        share(first, answers),
        share(said(), answers),
        share(swapped, leading, tells),
        share(swapped, answers, tells),
        share(said(kept(R1)), answers),
        share(said(kept(0, 2)), answers),
    )
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Measure each group and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an exported pondering model that learned this world")
    parser.add_argument("world", type=Path, help="the folder that facts.py made")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    model, tokenizer = load_folder(options.folder)
    facts, groups = read_world(options.world)
    found = {name: measure(model, tokenizer.convert_tokens_to_ids, facts, asked) for name, asked in groups.items()}
    print(f"| group | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 1)}|")
    for name, figures in found.items():
        shown = (f"{figures[column]:,.0f}" if column == "items" else f"{figures[column]:.3f}" for column in COLUMNS)
        print(f"| {name} | {' | '.join(shown)} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
