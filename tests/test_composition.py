"""The world of the composition example: what is trained, what is asked, and that the answers are the world's."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.cli import _parser
from ponder_scale.config import RunConfig
from ponder_scale.settings.commandline import parse
from tests.commands import run_script
from tests.model.architectures import make

REPOSITORY = Path(__file__).parents[1]
FACTS = REPOSITORY / "examples/composition/facts.py"
GROUPS = {"facts": 1, "two hops, neither new": 2, "two hops, second new": 2, "two hops, first new": 2}
GROUPS |= {"two hops, both new": 2, "three hops, all new": 3, "four hops, all new": 4}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def made(folder: Path, seed: int) -> Path:
    out = folder / str(seed)
    words = ["--entities", "12", "--relations", "6", "--new", "0.25"]
    done = subprocess.run([sys.executable, FACTS, out, "--seed", str(seed), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("world"), 7)


def test_new_facts_are_trained_alone_and_their_compositions_asked(out: Path) -> None:
    world = {(h, r): t for h, r, t in (line["text"].split() for line in lines(out / "facts.jsonl"))}
    assert len(world) == 12 * 6
    used, trained = set(), set()
    for line in lines(out / "compositions.jsonl"):
        h, one, two, t = line["text"].split()
        assert world[world[h, one], two] == t
        used |= {(h, one), (world[h, one], two)}
        trained.add(f"{h} {one} {two}")
    new = world.keys() - used
    assert len(new) == 18  # a quarter: all others are in some composition
    counts: Counter[str] = Counter()
    for item in lines(out / "items.jsonl"):
        at, *relations = item["prompt"].split()
        chain = []
        for relation in relations:
            chain.append((at, relation))
            at = world[at, relation]
        assert item["answer"] == f" {at}" and len(chain) == GROUPS[item["group"]], item
        assert item["prompt"] not in trained
        expected = {
            "two hops, neither new": [False, False],
            "two hops, second new": [False, True],
            "two hops, first new": [True, False],
        }.get(item["group"], [True] * len(chain))
        assert item["group"] == "facts" or [fact in new for fact in chain] == expected, item
        counts[item["group"]] += 1
    assert counts.keys() == GROUPS.keys() and counts["facts"] == 72
    assert len({item["prompt"] for item in lines(out / "items.jsonl")}) == sum(counts.values())


def test_a_seed_makes_one_world(out: Path, tmp_path: Path) -> None:
    again, other = made(tmp_path, 7), made(tmp_path, 8)
    for name in ("facts.jsonl", "compositions.jsonl", "items.jsonl", "tokenizer/tokenizer.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    assert (other / "facts.jsonl").read_bytes() != (out / "facts.jsonl").read_bytes()


def test_a_word_is_a_token_and_the_prompt_ends_before_its_answer(out: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    item = lines(out / "items.jsonl")[-1]
    prompt, whole = (tokenizer(text)["input_ids"] for text in (item["prompt"], item["prompt"] + item["answer"]))
    assert len(prompt) == 5 and whole[:-1] == prompt and len(tokenizer) == 12 + 6 + 1


def test_the_evidence_asks_for_what_the_items_have_on_other_seeds_than_it_was_tuned_on() -> None:
    evidence = runpy.run_path(str(REPOSITORY / "examples/composition/evidence.py"), run_name="evidence")
    assert evidence["GOAL"] in {*GROUPS, "all"} and not set(evidence["SEEDS"]) & set(evidence["TUNING_SEEDS"])
    command = evidence["comparison"](Path("out"), [3, 4], "run_dir=out", "--only", "looped/seed-3")
    options = parse(_parser(), command[1:], RunConfig, "overrides")
    assert command[0] == "ponder-scale" and "run_dir=out" in options.overrides and options.only == "looped/seed-3"
    assert options.answer_steps == list(range(7)) and options.seeds == [3, 4]


def test_every_model_of_the_evidence_has_settings_that_were_tried_and_tuning_uses_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = runpy.run_path(str(REPOSITORY / "examples/composition/evidence.py"), run_name="evidence")
    members = {*evidence["FIRST"], *evidence["LATER"]}
    assert evidence["BEST"].keys() == members and not {*evidence["EXTRAS"]} - members
    assert all(rate in evidence["RATES"] and decay in evidence["DECAYS"] for rate, decay in evidence["BEST"].values())
    names = members - {"vanilla-time"}  # whose length is known once the others have trained
    asked: list[Any] = []
    monkeypatch.setitem(evidence["tune"].__globals__, "together", lambda commands, jobs: asked.extend(commands))
    evidence["tune"](tmp_path, 1)
    tried = [parse(_parser(), command[1:], RunConfig, "overrides") for command in asked]
    assert not any(options.own for options in tried)
    assert len({(options.only, *options.overrides) for options in tried}) == len(tried) == 6 * 6
    report = evidence["comparison"](Path("out"), [3], "run_dir=out", "--list")
    assert {name for name in names if f"--for {name} " in " ".join(report)} == names


@pytest.mark.parametrize("scaled", [True, False])
def test_the_mechanism_is_measured_as_a_loop_over_rows_measures_it(out: Path, scaled: bool) -> None:
    """On a model that knows nothing, so that no figure is 0 or 1 by itself."""
    mechanism = runpy.run_path(str(FACTS.with_name("mechanism.py")), run_name="mechanism")
    facts, groups = mechanism["read_world"](out)
    asked = [words for group in groups.values() for words in group][-40:]
    entities = sorted({h for h, _ in facts})
    words = [*entities, *sorted({r for _, r in facts})]
    model = make("llama", 3, pondering_steps=1, vocab_size=len(words), scale_embeds=scaled)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    found = mechanism["measure"](model, words.index, facts, asked)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    scale = model.config.hidden_size**0.5 if scaled else 1.0

    def last(embeds: torch.Tensor) -> int:
        with torch.no_grad():
            return int((model.run_pass(embeds, 1, None).last_hidden_state[0, -1] @ head.T).argmax())

    sums = dict.fromkeys(mechanism["COLUMNS"], 0.0) | {"items": 40.0}
    different = 0
    for row, (h, r1, r2) in enumerate(asked):
        bridge = facts[h, r1]
        other = entities[(entities.index(bridge) + 1 + row % (len(entities) - 1)) % len(entities)]
        answer, leading = words.index(facts[bridge, r2]), words.index(facts[other, r2])
        with torch.no_grad():
            e = scale * table[[words.index(word) for word in (h, r1, r2)]][None]
            p = (model.run_pass(e, 0, None).last_hidden_state @ head.T).softmax(-1)
            t = scale * (p @ table)

            alone, without, swapped = torch.zeros_like(t), t.clone(), t.clone()
            alone[:, 1], without[:, 1], swapped[:, 1] = t[:, 1], 0, scale * table[words.index(other)]
            sums["bridge"] += int(p[0, 1].argmax()) == words.index(bridge)
            sums["p(bridge)"] += p[0, 1, words.index(bridge)].item()
            sums["S = 0"] += int(p[0, -1].argmax()) == answer
            for name, fed_back in (("S = 1", t), ("r1 alone", alone), ("without r1", without)):
                sums[name] += last(e + fed_back) == answer
            if answer != leading:
                different += 1
                sums["follows"] += last(e + swapped) == leading
                sums["stays"] += last(e + swapped) == answer
    means = {name: value / (different if name in ("follows", "stays") else 40) for name, value in sums.items()}
    assert found == pytest.approx(means | {"items": 40}, rel=1e-4) and 0 < different < 40
    assert len({round(found[name], 3) for name in ("S = 0", "S = 1", "r1 alone", "without r1")}) > 1


def test_the_commands_of_the_examples_readme_run(tmp_path: Path) -> None:
    text = FACTS.with_name("README.md").read_text()
    (script,) = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    small = ("run_dir=runs/composition", "run_dir=runs/composition train.steps=2 optim.warmup_steps=1")
    (tmp_path / "script.sh").write_text(
        "set -e\n" + script.replace(*small, 1).replace("--seed 11", "--seed 11 --entities 12")
    )
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    done = run_script("sh", "script.sh", folder=tmp_path, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    tables = re.findall(r"^\| group \|.*$", done.stdout, flags=re.MULTILINE)
    assert (
        tables == re.findall(r"^\| group \|.*$", text, flags=re.MULTILINE) and "| two hops, both new |" in done.stdout
    )
