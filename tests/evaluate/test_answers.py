"""Answers are right where greedy decoding writes them: by group, by pondering steps, with a binomial's interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.errors import ConfigError
from ponder_scale.evaluate.answers import Item, Score, as_plain, evaluate_answers, read_items, score, table
from tests.commands import run_command
from tests.model.architectures import make

PROMPTS = ["The quick", "def square", "number *", "Every byte has", "lazy dog, and the", "Größe"]


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, steps: int) -> str | None:
    """What plain forwards write after a prompt in two tokens; None where that text has other tokens."""
    ids = tokenizer(prompt)["input_ids"]
    written = list(ids)
    for _ in range(2):
        written.append(int(model(torch.tensor([written]), pondering_steps=steps).logits[0, -1].argmax()))
    answer = tokenizer.decode(written)[len(tokenizer.decode(ids)) :]
    return answer if answer and tokenizer(prompt + answer)["input_ids"] == written else None


def test_what_greedy_decoding_writes_is_right_and_nothing_else(model: Any, folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    items, expected = [], {}
    for steps in (0, 2):
        own = [
            Item(prompt, answer, f"of {steps}")
            for prompt in PROMPTS
            if (answer := greedy(model, tokenizer, prompt, steps))
        ]
        assert own, "no prompt whose continuation is text of the same tokens"
        items += own
        for k in (0, 2):
            again = [greedy(model, tokenizer, item.prompt, k) == item.answer for item in own]
            expected[f"of {steps}", k] = sum(again)
    found = score(model, tokenizer, items, [0, 2])
    for steps in (0, 2):
        assert found[f"of {steps}"].right[steps] == found[f"of {steps}"].items  # all of its own
        for k in (0, 2):
            assert found[f"of {steps}"].right[k] == expected[f"of {steps}", k]
    assert found["all"].right[0] == sum(found[f"of {steps}"].right[0] for steps in (0, 2))
    wrong = [Item(item.prompt, " never", item.group) for item in items]
    assert score(model, tokenizer, wrong, [2])["all"].right == {2: 0}


def test_a_model_that_halts_is_shown_with_the_steps_that_the_tokens_of_the_prompts_took(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    model = make("llama", pondering_steps=2, halting="gate", vocab_size=len(tokenizer)).eval()
    with torch.no_grad():
        for gate in model.halting_gates:
            gate.up.weight.normal_(std=0.3)
            gate.down.weight.normal_(std=1.0)
            gate.down.bias.fill_(0.5)
    model.config.halting_threshold = 0.5
    items = [Item(prompt, " own", "long" if len(prompt) > 8 else "short") for prompt in PROMPTS]
    found = score(model, tokenizer, items, [0, 1, 2])
    for group in ("long", "short"):
        prompts = [tokenizer(item.prompt)["input_ids"] for item in items if item.group == group]
        for k in (0, 1, 2):
            # one prompt at a time, without padding
            taken = [
                float(model(rows, shift_labels=rows, pondering_steps=k).pass_shares[1:].sum()) * rows.shape[1]
                if k
                else 0.0
                for rows in (torch.tensor([prompt]) for prompt in prompts)
            ]
            assert found[group].taken[k] == pytest.approx(sum(taken) / sum(map(len, prompts)), abs=1e-5)
    assert 0.0 < found["long"].taken[2] < 2.0, "nothing to see"
    assert f", {found['long'].taken[2]:.2f} steps |" in table(found)[2]
    assert as_plain(found)["long"]["steps taken"]["0"] == 0.0


def test_the_interval_is_wilsons() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    low, high = Score(263, {0: 81}).interval(0)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = Score(20, {0: 0}).interval(0)
    assert (round(low, 4), round(high, 4)) == (0.0, 0.1611)
    assert table({"a": Score(20, {0: 0, 1: 20})})[2] == "| a | 20 | 0.000 (0.000 to 0.161) | 1.000 (0.839 to 1.000) |"


def test_the_command_prints_and_writes_the_counts(model: Any, folder: Path, tmp_path: Path) -> None:
    answer = greedy(model, tokenizer_of(folder), PROMPTS[0], 2) or "x"
    lines = [
        {"prompt": PROMPTS[0], "answer": answer, "group": "own"},
        {"prompt": "a", "answer": " never", "group": "no"},
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    command = ["ponder-scale", "evaluate", "answers", folder, "--items", tmp_path / "items.jsonl"]
    done = run_command(*command, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "| group | items | S = 0 | S = 1 | S = 2 |" in done.stdout and "| no | 1 | 0.000" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())["groups"]
    assert written["all"]["items"] == 2 and written["no"]["right"] == {"0": 0, "1": 0, "2": 0}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no line in it"),
        ('{"prompt": "a"}\n', r"line 1: expected \{\"prompt\": text, \"answer\": text\}.*found"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n', "line 2: expected"),
        ('{"prompt": "a", "answer": 3}\n', "line 1: expected"),
        ('["prompt", "answer"]\n', "line 1: expected"),
        ("not json\n", "line 1: expected .*found not json"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_items(tmp_path / "items.jsonl")


def test_items_that_cannot_be_asked_are_refused(folder: Path, tmp_path: Path) -> None:
    def ask(prompt: str, answer: str) -> None:
        (tmp_path / "items.jsonl").write_text(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
        evaluate_answers(folder, tmp_path / "items.jsonl")

    with pytest.raises(ConfigError, match="no token comes before it"):
        ask("", "the")
    with pytest.raises(ConfigError, match="begins within a token of the prompt"):
        word = next(
            text for text in tokenizer_of(folder).get_vocab() if text.isascii() and text.isalpha() and len(text) > 2
        )
        ask(word[:1], word[1:])
    with pytest.raises(ConfigError, match="tokens; the model has 32 positions"):
        ask("The " * 40, "quick")
