"""What a user tunes a corpus by: functions of one's own, samples, evaluation sets, dropped texts to look at."""

import json
import re
import sys

import pytest

from data_pipeline.clean.filters import chosen
from data_pipeline.cli import main
from data_pipeline.tokenize.tokenizer import open_tokenizer
from ponder_scale.errors import ConfigError
from ponder_scale.shards.manifest import read_manifest, verify
from tests.data_pipeline.builds import arguments, documents, make_texts, write_jsonl
from tests.data_pipeline.reading import SUFFIXES, stored

OWN = '''
def shouting(text, *, most=0.5):
    """Too many capitals."""
    capitals = sum(map(str.isupper, text))
    return "shouting" if capitals > most * len(text) else None

def wrong(text):
    return True

def failing(text):
    return text.nothing
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file of a module with filters of the user's own."""
    name = f"own_filters_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / f"{name}.py"
    sys.modules.pop(name, None)


def texts_of(out) -> list[str]:
    tokenizer = open_tokenizer(out / "tokenizer")
    return [tokenizer.decode(one[:-1]) for one in documents(out, "train")]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_filter_may_be_a_function_of_ones_own(tiny_tokenizer, tmp_path, own, capsys, workers):
    corpus = write_jsonl(tmp_path / "web.jsonl", ["quiet", "LOUD", "Half IS", "AND"] * 20)
    settings = ["heldout_fraction=0", f"workers={workers}", "shard_bytes=400"]
    hook = f"sources.web.filters={{'{own.stem}:shouting': {{most: 0.9}}, length: {{min_characters: 5}}}}"
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", hook, *settings)) == 0
    assert set(texts_of(tmp_path / "out")) == {"quiet", "Half IS"}
    assert read_manifest(tmp_path / "out").provenance["sources"]["web"]["drops"] == {"shouting": 40}
    own.write_text(OWN.replace("0.5", "0.6"))
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", hook, *settings)) == 2
    assert "another tokenizer: settings (files that filters read) differ" in capsys.readouterr().err


def test_a_filter_of_ones_own_that_cannot_be_used_is_one_clear_line(tiny_tokenizer, tmp_path, own, capsys):
    for name, message in (
        (
            "no_such_module:f",
            "sources.web.filters.no_such_module:f: no_such_module:f cannot be used (ModuleNotFoundError",
        ),
        (f"{own.stem}:nothing", "cannot be used (AttributeError"),
        (f"{own.stem}:OWN", "cannot be used (AttributeError"),
        (f"{own.stem}:wrong", "wrong returned True; expected the reason to drop a text, or None to keep it"),
        (f"{own.stem}:failing", "failing failed (AttributeError: 'str' object has no attribute 'nothing') for a text"),
    ):
        corpus = write_jsonl(tmp_path / "web.jsonl", ["some text"])
        settings = [f"sources.web.filters={{'{name}': {{}}}}", "workers=1"]
        assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", *settings)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match=r"shouting\.least: unknown threshold; expected one of: most"):
        chosen("web", {f"{own.stem}:shouting": {"least": 1}})


def test_a_sample_is_chosen_by_the_text_and_is_not_the_held_out_split(tiny_tokenizer, tmp_path):
    texts = make_texts(1000)
    corpus = write_jsonl(tmp_path / "web.jsonl", texts + [f"{text}\n" for text in texts[:200]])
    found = {}
    for name, more in (("all", []), ("some", ["sources.web.sample=0.3"]), ("less", ["sources.web.sample=0.1"])):
        out = tmp_path / name
        assert main(arguments(corpus, tiny_tokenizer, out, *more, "workers=1")) == 0
        tokenizer = open_tokenizer(out / "tokenizer")
        found[name] = {
            split: {tokenizer.decode(one[:-1]) for one in documents(out, split)} for split in ("train", "heldout")
        }
    some, less = ({text for side in found[name].values() for text in side} for name in ("some", "less"))
    assert 0.2 < len(some) / 1200 < 0.4 and less < some
    assert all((text in some) == (f"{text}\n" in some) for text in texts[:200])
    for split in ("train", "heldout"):
        assert found["some"][split] < found["all"][split]
    assert 0.05 < len(found["some"]["heldout"]) / len(some) < 0.16  # a tenth of it, not what the sample leaves
    drops = read_manifest(tmp_path / "some").provenance["sources"]["web"]["drops"]
    assert drops == {"not in the sample": 1200 - len(some)}


def test_a_text_outside_the_sample_takes_no_duplicate_with_it(tiny_tokenizer, tmp_path):
    texts = make_texts(100)
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    settings = [f"out={tmp_path / 'out'}", f"tokenizer={tiny_tokenizer}", "deduplicate=exact", "heldout_fraction=0"]
    for name in ("a", "b"):
        settings += [f"sources.{name}.kind=jsonl", f"sources.{name}.path={tmp_path / name}.jsonl"]
    assert main(["build", *settings, "sources.a.sample=0.5", "workers=1"]) == 0
    assert sorted(texts_of(tmp_path / "out")) == sorted(texts)


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_dropped_texts_are_kept_with_their_reasons_if_asked_for(tiny_tokenizer, tmp_path, shuffle):
    texts = [f"{i}: a text of some words" for i in range(40)]
    corpus = write_jsonl(tmp_path / "web.jsonl", [*texts, "short", texts[3], "tiny"])
    settings = ["sources.web.filters={length: {min_characters: 10}}", "deduplicate=exact", "keep_dropped=true"]
    out = tmp_path / "out"
    more = [f"shuffle={shuffle}", "shard_bytes=300", "workers=2"]
    assert main(arguments(corpus, tiny_tokenizer, out, *settings, *more)) == 0
    assert [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()] == [
        {"source": "web", "reason": "length: too short", "text": "short"},
        {"source": "web", "reason": "duplicate", "text": texts[3]},
        {"source": "web", "reason": "length: too short", "text": "tiny"},
    ]
    assert (out / "quarantine.jsonl").read_text() == ""
    assert verify(out) == []
    again = arguments(out / "dropped.jsonl", tiny_tokenizer, tmp_path / "dropped", "heldout_fraction=0")
    assert main(again) == 0
    assert texts_of(tmp_path / "dropped") == ["short", texts[3], "tiny"]
    assert not (tmp_path / "dropped" / "dropped.jsonl").exists()


QUESTION = "Which of the seven rivers of the old kingdom flows past the town where the king was born?"
FACT = "In nineteen hundred and four the first of the new bridges over the broad river was opened to carts."


@pytest.fixture
def sets(tmp_path):
    (tmp_path / "quiz.jsonl").write_text(
        "".join(json.dumps({"question": text, "text": 1}) + "\n" for text in (QUESTION, "Too short a question?"))
    )
    (tmp_path / "facts.jsonl").write_text(json.dumps({"question": FACT}) + "\n")
    return f"against: [{tmp_path}/quiz.jsonl, {tmp_path}/facts.jsonl], field: question"


def test_texts_with_a_stretch_of_an_evaluation_set_are_dropped_and_counted_by_set(
    tiny_tokenizer, tmp_path, sets, capsys
):
    words = QUESTION.split()
    keep = [
        "Too short a question?",
        " ".join(words[:12]) + " ends",
        "no words in common with any of the sets at all " * 3,
    ]
    drop = [
        f"before {' '.join(words[2:15]).upper()}, after",
        QUESTION.replace(" ", "\n"),
        "x, " + FACT.replace(" ", " - "),
    ]
    corpus = write_jsonl(tmp_path / "web.jsonl", [*keep, *drop])
    settings = [f"sources.web.filters={{decontaminate: {{{sets}}}}}", "heldout_fraction=0", "keep_dropped=true"]
    out = tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, out, *settings, "workers=1")) == 0
    assert texts_of(out) == keep
    drops = read_manifest(out).provenance["sources"]["web"]["drops"]
    assert drops == {"decontaminate: facts.jsonl": 1, "decontaminate: quiz.jsonl": 2}
    assert [json.loads(line)["text"] for line in (out / "dropped.jsonl").read_text().splitlines()] == drop
    glob = settings[0].replace(f"{tmp_path}/quiz.jsonl, {tmp_path}/facts.jsonl", f"'{tmp_path}/*[zt]*.jsonl'")
    assert "*" in glob
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "glob", glob, *settings[1:], "workers=1")) == 0
    assert read_manifest(tmp_path / "glob").provenance["sources"]["web"]["drops"] == drops
    with (tmp_path / "facts.jsonl").open("a") as stream:
        stream.write(json.dumps({"question": QUESTION}) + "\n")
    capsys.readouterr()
    assert main(arguments(corpus, tiny_tokenizer, out, *settings, "workers=1")) == 2
    assert "settings (files that filters read) differ" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_evaluation_sets_and_texts_to_learn_from_are_read_compressed_in_every_way(tmp_path, capsys, suffix):
    quiz = stored(tmp_path / f"quiz.jsonl{suffix}", (json.dumps({"text": QUESTION}) + "\n").encode())
    (screen,) = chosen("web", {"decontaminate": {"against": [str(quiz)]}})
    assert screen(QUESTION) == f"decontaminate: {quiz.name}"
    learn = ["train-tokenizer", str(quiz), "--vocab-size", "260", "--out", str(tmp_path / "tokenizer")]
    assert main(learn) == 0
    assert f"1 documents, {len(QUESTION)} bytes of text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ("{}", "sources.web.filters.decontaminate.against names no evaluation set; give a list of files"),
        ("{against: quiz.jsonl}", "sources.web.filters.decontaminate.against names no evaluation set"),
        ("{against: [nothing.jsonl]}", "decontaminate: nothing.jsonl: no such file"),
        ("{SETS, n: 30}", "no text of .*quiz.jsonl has 30 words; lower n or leave it out"),
        ("{SETS, n: 0}", "n is 0; expected at least 1 word"),
        ("{SETS, n: 1.5}", "n is 1.5; expected at least 1 word, and a whole number"),
        ("{against: ['FOLDER/*.jsonl'], field: question}", "links that lead nowhere, the first is .*lost.jsonl; rep"),
        (
            "{SETS, field: text}",
            "quiz.jsonl at 0: field is not a string; every record of an evaluation set must be readable",
        ),
    ],
)
def test_an_evaluation_set_that_cannot_be_read_whole_is_refused(
    tiny_tokenizer, tmp_path, sets, capsys, thresholds, message
):
    corpus = write_jsonl(tmp_path / "web.jsonl", ["some text"])
    if "FOLDER" in thresholds:
        (tmp_path / "lost.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
        thresholds = thresholds.replace("FOLDER", str(tmp_path))
    if "field: text" in thresholds:
        sets = sets.replace("field: question", "n: 13")
    settings = f"sources.web.filters={{decontaminate: {thresholds.replace('SETS', sets)}}}"
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", settings, "workers=1")) == 2
    error = capsys.readouterr().err

    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
