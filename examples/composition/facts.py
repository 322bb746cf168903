"""A world of facts and their compositions, to be learned and then asked about: python facts.py OUT --seed 1

There are entities e0, e1, ... and relations r0, r1, ... A fact `h r t` says that relation r leads from entity h to
entity t, which is drawn at random. A composition `h r1 r2 t2` follows two facts and does not name the entity between
them. Training holds all facts. It holds compositions only of facts that are not *new*. The new ones are learned alone,
and what they compose to is never seen. After arXiv 2405.15071 and 2607.00341, which ask the same of transformers.

    OUT/facts.jsonl         every fact, for training
    OUT/compositions.jsonl  nine of ten compositions of two facts that are not new, for training
    OUT/items.jsonl         what is asked, by group
    OUT/tokenizer/          a token for each entity and relation
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

END = "</s>"
HELD_OUT = 0.1  # of the compositions of facts that are not new: asked, not trained
MOST = 1000  # items in each group

Fact = tuple[int, int]  # an entity and a relation; where it leads is the world's
World = dict[Fact, int]


def draw(seed: int, entities: int, relations: int, share: float) -> tuple[World, set[Fact]]:
    """A world, and which of its facts are new."""
    generator = random.Random(seed)
    world = {(h, r): generator.randrange(entities) for h in range(entities) for r in range(relations)}
    facts = list(world)
    generator.shuffle(facts)
    return world, set(facts[: round(len(facts) * share)])


def chains(world: World, relations: int, hops: int) -> Iterator[tuple[Fact, ...]]:
    """Every chain of this many facts, in which each fact begins where the one before it leads."""
    longer = [(fact,) for fact in world]
    for _ in range(hops - 1):
        longer = [(*chain, (world[chain[-1]], r)) for chain in longer for r in range(relations)]
    yield from longer


def words(chain: tuple[Fact, ...]) -> str:
    """The first entity and the relations."""
    return " ".join([f"e{chain[0][0]}", *(f"r{relation}" for _, relation in chain)])


def item(world: World, chain: tuple[Fact, ...], group: str) -> dict[str, str]:
    """A question, with its answer in the world."""
    return {"prompt": words(chain), "answer": f" e{world[chain[-1]]}", "group": group}


def asked(world: World, new: set[Fact], held_out: list[tuple[Fact, ...]], relations: int) -> Iterator[dict[str, str]]:
    """The items: facts, held-out compositions, compositions with a new fact in them, longer ones of new facts alone."""
    yield from (item(world, (fact,), "facts") for fact in world)
    yield from (item(world, chain, "two hops, neither new") for chain in held_out)
    found: dict[str, list[tuple[Fact, ...]]] = {}
    for name, are_new in (("second new", [False, True]), ("first new", [True, False]), ("both new", [True, True])):
        two = (chain for chain in chains(world, relations, 2) if [fact in new for fact in chain] == are_new)
        found[f"two hops, {name}"] = list(two)
    for hops, name in ((3, "three hops, all new"), (4, "four hops, all new")):
        longer = [(fact,) for fact in world if fact in new]
        for _ in range(hops - 1):
            longer = [
                (*chain, after) for chain in longer for r in range(relations) if (after := (world[chain[-1]], r)) in new
            ]
        found[name] = longer
    for name, several in found.items():
        several = several if len(several) <= MOST else random.Random(0).sample(several, MOST)
        yield from (item(world, chain, name) for chain in several)


def write(file: Path, lines: Iterable[dict[str, str]]) -> None:
    """Write values as JSON lines."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_tokenizer(folder: Path, names: list[str]) -> None:
    """A tokenizer whose tokens are these words and the end of a document."""
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate([END, *names])}, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main() -> None:
    """Draw a world and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--entities", type=int, default=40)
    parser.add_argument("--relations", type=int, default=16)
    parser.add_argument("--new", type=float, default=0.125, help="share of the facts that are in no composition")
    options = parser.parse_args()
    world, new = draw(options.seed, options.entities, options.relations, options.new)
    two = [chain for chain in chains(world, options.relations, 2) if not any(fact in new for fact in chain)]
    generator = random.Random(options.seed)
    held_out = {chain for chain in two if generator.random() < HELD_OUT}
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    write(out / "facts.jsonl", ({"text": f"{words((fact,))} e{to}"} for fact, to in world.items()))
    trained = [chain for chain in two if chain not in held_out]
    write(out / "compositions.jsonl", ({"text": f"{words(chain)} e{world[chain[-1]]}"} for chain in trained))
    asking = sorted(held_out)
    asking = asking if len(asking) <= MOST else random.Random(0).sample(asking, MOST)
    items = list(asked(world, new, asking, options.relations))
    write(out / "items.jsonl", items)
    names = [f"e{i}" for i in range(options.entities)] + [f"r{i}" for i in range(options.relations)]
    write_tokenizer(out / "tokenizer", names)
    counts: dict[str, int] = {}
    for each in items:
        counts[each["group"]] = counts.get(each["group"], 0) + 1
    print(f"{out}: {len(world):,} facts, {len(new):,} of them new; {len(trained):,} compositions; items: {counts}")


if __name__ == "__main__":
    main()
