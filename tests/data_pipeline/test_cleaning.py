import inspect
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data_pipeline.clean import dedup
from data_pipeline.clean.filters import (
    EDITS,
    FILTERS,
    LINES,
    c4,
    c4_lines,
    chosen,
    gopher_quality,
    gopher_repetition,
    length,
)
from data_pipeline.cli import main
from data_pipeline.tokenize.tokenizer import open_tokenizer
from data_pipeline.write import shuffle
from ponder_scale.errors import ConfigError
from ponder_scale.shards.format import open_shards
from ponder_scale.shards.manifest import read_manifest, verify
from tests.data_pipeline.builds import arguments, documents, make_texts, write_jsonl

PROSE = " ".join(
    f"In the year {year} the people of the town have walked to the market with baskets and came back with bread."
    for year in range(1900, 1910)
)
WORDS = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(600)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, None),
        ("too few words with the stop word of", "number of words"),
        ("the of " + "ab " * 60, "mean length of words"),
        ("the of " + "incomprehensibilities " * 60, "mean length of words"),
        (PROSE + " #" * 60, "symbols"),
        ("\n".join(f"- the item number {line} of some lengthy list" for line in range(40)), "bullets"),
        (
            "\n".join(
                f"the line {line} of a list with many words that still goes on and trails off..." for line in range(40)
            ),
            "ellipses",
        ),
        ("the of with " + "1234 " * 60, "words without letters"),
        (" ".join(WORDS[:60]), "stop words"),
    ],
)
def test_gopher_quality_drops_by_the_published_thresholds(text, reason):
    found = gopher_quality(text)
    assert found == (None if reason is None else f"gopher_quality: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" ".join(WORDS), None),
        ("\n".join(["the same line"] * 4 + [" ".join(WORDS)]), "lines"),
        ("\n\n".join(["same paragraph here"] * 3 + [" ".join(WORDS[:50])]), "lines"),
        (" ".join(f"{word} again and" for word in WORDS[:30]), "most frequent 2-gram"),
        (" ".join([*WORDS[:40], *WORDS[:15], *WORDS[40:60]]), "5-grams"),
        (" ".join([*WORDS[:40], *WORDS[:12], *WORDS[40:60]]), "6-grams"),
    ],
)
def test_gopher_repetition_drops_by_the_published_thresholds(text, reason):
    found = gopher_repetition(text)
    assert found == (None if reason is None else f"gopher_repetition: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("One. Two! Three? Four. Five.", None),
        ("One. Two. Three.", "number of sentences"),
        ("One. Two. Three. Four. Five. {", "braces"),
        ("Lorem ipsum one. Two. Three. Four. Five.", "lorem ipsum"),
        ("One. Two. Three. Four. Five. " + "x" * 1001, "number of sentences"),
        ("One. Two. Three. Four. Five.\n" + "x" * 1001, None),
        ("One. Two. Three. Four. Five.\n{ lorem ipsum " + "x" * 1001, None),
        ("One. Two. Three. Four. Five. " + "x" * 1000, None),
    ],
)
def test_c4_drops_whole_pages_by_its_rules(text, reason):
    assert c4(text) == (None if reason is None else f"c4: {reason}")


def test_a_word_of_a_thousand_characters_stays_and_a_longer_one_takes_its_line_along():
    assert c4_lines("one\n" + "x" * 1000 + "\n") == ("one\n" + "x" * 1000 + "\n", {})
    assert c4_lines("one\n" + "x" * 1001 + "\ntwo") == ("one\ntwo", {LINES: 1})


SENTENCES = [f"the {word} of this line is like that of no other" for word in WORDS]


@pytest.mark.parametrize(
    ("kept", "dropped", "reason"),
    [
        # Gopher, A.1.1: "between 50 and 100,000 words"
        (" ".join(["the", "with", *WORDS[:48]]), " ".join(["the", "with", *WORDS[:47]]), "number of words"),
        ("the with " + "word " * 99_998, "the with " + "word " * 99_999, "number of words"),
        # "mean word length outside the range of 3 to 10 characters"
        ("the of " + "abc " * 97 + "abcd", "the of " + "abc " * 98, "mean length of words"),
        (
            "the with " + "abcdefghij " * 97 + "x" * 23,
            "the with " + "abcdefghij " * 97 + "x" * 24,
            "mean length of words",
        ),
        # "a symbol-to-word ratio greater than 0.1 for either the hash symbol or the ellipsis"
        ("the with " + "words " * 88 + "#word " * 10, "the with " + "words " * 87 + "#word " * 11, "symbols"),
        (
            "the with " + "words " * 87 + "word... " * 10 + "words",
            "the with " + "words " * 86 + "word... " * 11 + "words",
            "symbols",
        ),
        (
            "the with " + "words " * 87 + "word\u2026 " * 10 + "words",
            "the with " + "words " * 86 + "word\u2026 " * 11 + "words",
            "symbols",
        ),
        # "more than 90% of lines starting with a bullet point, or more than 30% ending with an ellipsis"
        (
            "\n".join(["- " + line for line in SENTENCES[:9]] + SENTENCES[9:10]),
            "\n".join(["- " + line for line in SENTENCES[:10]] + SENTENCES[10:11]),
            "bullets",
        ),
        (
            "\n".join([line + "..." for line in SENTENCES[:3]] + SENTENCES[3:10]),
            "\n".join([line + "..." for line in SENTENCES[:4]] + SENTENCES[4:13]),
            "ellipses",
        ),
        # "80% of words in a document contain at least one alphabetic character"
        ("the with " + "word " * 78 + "1234 " * 20, "the with " + "word " * 77 + "1234 " * 21, "words without letters"),
        # "at least two of the following English words: the, be, to, of, and, that, have, with"
        ("the with " + "word " * 60, "the the " + "word " * 60, "stop words"),
    ],
)
def test_gopher_quality_has_the_published_thresholds_on_both_sides(kept, dropped, reason):
    assert gopher_quality(kept) is None
    assert gopher_quality(dropped) == f"gopher_quality: {reason}"


def test_all_thresholds_are_the_published_ones():
    """Gopher, Rae et al. 2021, A.1.1 and table A1; C4, Raffel et al. 2020, 2.2."""
    defaults = {
        name: {key: one.default for key, one in list(inspect.signature(some).parameters.items())[1:]}
        for name, some in {**FILTERS, "pii": EDITS["pii"]}.items()
    }
    assert defaults == {
        "length": {"min_characters": 1, "max_characters": None},
        "gopher_quality": {
            "min_words": 50,
            "max_words": 100_000,
            "min_mean_word": 3.0,
            "max_mean_word": 10.0,
            "max_symbols_per_word": 0.1,
            "max_bullet_lines": 0.9,
            "max_ellipsis_lines": 0.3,
            "min_alphabetic_words": 0.8,
            "min_stop_words": 2,
        },
        "gopher_repetition": {
            "max_duplicate_lines": 0.3,
            "max_duplicate_paragraphs": 0.3,
            "max_duplicate_line_characters": 0.2,
            "max_duplicate_paragraph_characters": 0.2,
            "max_top_n_grams": (0.2, 0.18, 0.16),
            "max_duplicate_n_grams": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
        },
        "c4": {"min_sentences": 5, "max_lorem_ipsum": 0, "max_braces": 0, "max_word": 1000},
        "decontaminate": {"against": (), "field": "text", "n": 13},
        "language": {"keep": (), "min_score": 0.5, "characters": 10_000},
        "url": {"field": "url", "block": ()},
        "pii": {"email": "email@example.com", "ip": "192.0.2.1"},
    }


# A text, and what its shares are by datatrove 0.10.1 (gopher_repetition_filter.py, get_n_grams, find_top_duplicate and
# find_all_duplicate, over the length of the text), given the words between white space: most frequent 2- to 4-gram,
# repeated 5- to 10-grams. An n-gram that stands there once is not frequent here; datatrove counts it.
INDENTED = "".join(
    f"        if value{i} is None:\n            value{i} = default\n            continue\n" for i in range(12)
)
SHARES = {
    INDENTED: (96 / 928, 216 / 928, 231 / 928, 0, 0, 0, 0, 0, 0),
    " ".join([*WORDS[:40], *WORDS[:12], *WORDS[40:60]]): (
        *(26 / 503, 40 / 503, 54 / 503),
        *(60 / 503, 72 / 503, 42 / 503, 48 / 503, 54 / 503, 60 / 503),
    ),
    " ".join(f"{word} again and" for word in WORDS[:30]): (270 / 509, 0, 0, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("text", SHARES, ids=["indented code", "words again", "a phrase"])
def test_the_shares_of_n_grams_are_of_all_characters_as_in_datatrove(text, line_end):
    size, off = len(text), dict.fromkeys(("max_duplicate_lines", "max_duplicate_paragraphs"), 1)
    off |= dict.fromkeys(("max_duplicate_line_characters", "max_duplicate_paragraph_characters"), 1)
    text = text.replace("\n", line_end)
    shares = SHARES[text.replace(line_end, "\n")]
    top, duplicate = shares[:3], shares[3:]
    assert gopher_repetition(text, max_top_n_grams=top, max_duplicate_n_grams=duplicate, **off) is None
    for place, share in enumerate(shares):
        if share:
            lower = [*shares[:place], share - 0.5 / size, *shares[place + 1 :]]
            found = gopher_repetition(text, max_top_n_grams=lower[:3], max_duplicate_n_grams=lower[3:], **off)
            name = f"most frequent {place + 2}-gram" if place < 3 else f"{place + 2}-grams"
            assert found == f"gopher_repetition: {name}"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("kept", "dropped", "reason"),
    [
        # Gopher, table A1: duplicate lines 0.30, their characters 0.20; the same of paragraphs
        (["x"] * 4 + WORDS[:6], ["x"] * 5 + WORDS[:6], "lines"),  # 3 of 10, 4 of 11
        # one of 10 lines, 20 of 100 and of 99 characters
        (["y" * 20] * 2 + WORDS[:7] + ["x" * 9], ["y" * 20] * 2 + WORDS[:7] + ["x" * 8], "lines"),
    ],
)
def test_gopher_repetition_has_the_published_thresholds_on_both_sides_whatever_ends_a_line(
    kept, dropped, reason, line_end
):
    n_grams = {"max_top_n_grams": (1, 1, 1), "max_duplicate_n_grams": (1,) * 6}
    assert gopher_repetition(line_end.join(kept), **n_grams) is None
    if dropped:
        assert gopher_repetition(line_end.join(dropped), **n_grams) == f"gopher_repetition: {reason}"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_paragraphs_end_at_blank_lines_whatever_ends_a_line(line_end):
    """A paragraph of two lines that stands there three times; its lines are repeated as well, and are not asked."""
    paragraphs = [f"{WORDS[i]}\n  {WORDS[i + 1]}" for i in (0, 0, 0, 2, 4)]
    text = "\n\n".join(paragraphs[:2]) + "\n \n\n" + "\n\n".join(paragraphs[2:]) + "\n"
    off = {"max_duplicate_lines": 1, "max_duplicate_line_characters": 1}
    off |= {"max_top_n_grams": (1, 1, 1), "max_duplicate_n_grams": (1,) * 6}
    size = len(text)  # with \n
    text = text.replace("\n", line_end)
    few, all_of = {"max_duplicate_paragraph_characters": 1}, {"max_duplicate_paragraphs": 1}
    assert gopher_repetition(text, **few, **off) == "gopher_repetition: paragraphs"  # 2 of 5
    assert gopher_repetition(text, max_duplicate_paragraphs=0.4, **few, **off) is None
    assert gopher_repetition(text, **all_of, **off) == "gopher_repetition: paragraphs"  # 30 of 85 characters
    assert gopher_repetition(text, max_duplicate_paragraph_characters=30 / size, **all_of, **off) is None


def test_a_line_with_an_endless_word_is_left_out_and_counted_and_its_page_stays(tiny_tokenizer, tmp_path, capsys):
    page = "One. Two.\r\nThree. Four. Five.\n"
    blob = "data " + "A" * 1001 + "\n"
    corpus = write_jsonl(tmp_path / "web.jsonl", [blob + page + blob, page + "One.", blob])
    out = tmp_path / "out"
    settings = ["sources.web.filters={length: {max_characters: 100}, c4: {}}", "heldout_fraction=0"]
    assert main(arguments(corpus, tiny_tokenizer, out, *settings)) == 0
    assert "left out of documents of web: 3 lines with an endless word (c4)" in capsys.readouterr().out
    tokenizer = open_tokenizer(tiny_tokenizer)
    assert [tokenizer.decode(one[:-1]) for one in documents(out, "train")] == [page, page + "One."]
    counts = read_manifest(out).provenance["sources"]["web"]
    assert (counts["drops"], counts["lines_left_out"]) == ({"length: too short": 1}, 3)
    assert main(["inspect", str(out)]) == 0
    assert "dropped: 1 length: too short; 3 lines of documents (c4: endless word)" in capsys.readouterr().out


def test_lengths_and_thresholds_can_be_set():
    assert length("abc") is None
    assert length("abc", min_characters=4) == "length: too short"
    (screen,) = chosen("web", {"length": {"max_characters": 2}})
    assert screen("abc") == "length: too long"
    with pytest.raises(ConfigError, match=r"sources.web.filters.gofer: no such filter; expected one of: length, goph"):
        chosen("web", {"gofer": {}})
    with pytest.raises(ConfigError, match=r"filters.length.min_words: unknown threshold; expected one of: min_char"):
        chosen("web", {"length": {"min_words": 1}})


def test_thresholds_of_several_n_grams_are_lists():
    text = "one two three four five six seven eight nine ten " * 2
    (screen,) = chosen("web", {"gopher_repetition": {"max_duplicate_n_grams": [1, 1.0], "max_top_n_grams": [0.9]}})
    assert screen(text) is None
    (screen,) = chosen("web", {"gopher_repetition": {"max_duplicate_n_grams": [1, 0.1], "max_top_n_grams": []}})
    assert screen(text) == "gopher_repetition: 6-grams"


@pytest.mark.parametrize(
    "value", [0.3, "0.3", None, [0.3, "0.2"], [0.3, -0.1], [float("nan")], [True], [[0.3]], {2: 0.3}]
)
def test_a_threshold_that_should_be_a_list_and_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"max_top_n_grams is .*; expected a list of numbers, such as \[0.2, 0.18"):
        chosen("web", {"gopher_repetition": {"max_top_n_grams": value}})


@pytest.mark.parametrize("value", [[0.3], "1", None, -1, True, float("inf")])
def test_a_threshold_that_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"max_duplicate_lines is .*; expected a number, at least 0"):
        chosen("web", {"gopher_repetition": {"max_duplicate_lines": value}})


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("text", ["", " ", "\n\n", "x", "…", "# " * 100, "\U0001f600" * 1000])
def test_no_filter_fails_on_odd_texts(name, text):
    assert FILTERS[name](text) is None or FILTERS[name](text).startswith(name)


def test_each_source_has_its_own_field_and_filters_and_drops_are_counted(tiny_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in (PROSE, "short")))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", "tiny")))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
sources:
  books: {{kind: jsonl, path: {tmp_path}/a.jsonl, field: body, filters: {{gopher_quality: {{}}}}, weight: 2}}
  web: {{kind: jsonl, path: {tmp_path}/b.jsonl, filters: {{length: {{min_characters: 5}}}}, weight: 1}}
heldout_fraction: 0
"""
    )
    out = tmp_path / "out"
    assert main(["build", str(recipe), f"out={out}", f"tokenizer={tiny_tokenizer}"]) == 0
    manifest = read_manifest(out)
    assert manifest.provenance["sources"]["books"]["drops"] == {"gopher_quality: number of words": 1}
    assert manifest.provenance["sources"]["web"]["drops"] == {"length: too short": 1}
    assert manifest.weights == {"books": 2, "web": 1}
    assert [info.source for info in manifest.splits["train"]] == ["books", "web"]
    tokenizer = open_tokenizer(out / "tokenizer")
    assert [tokenizer.decode(one[:-1]) for one in documents(out, "train")] == [PROSE, "short"]


def test_the_signature_estimates_similarity():
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(400)]
    for keep in (400, 390, 300):
        other = [*words[:keep], *(f"v{i}" for i in range(400 - keep))]
        one, two = (dedup._signature(_grams(some)) for some in (words, other))
        a, b = ({tuple(some[i : i + 5]) for i in range(len(some) - 4)} for some in (words, other))
        assert abs((one == two).mean() - len(a & b) / len(a | b)) < 0.12
    assert generator is not None


def _grams(words: list[str]) -> np.ndarray:
    table = {word: int(np.random.default_rng(abs(hash(word)) % 2**32).integers(2**63)) for word in words}
    grams = [hash(tuple(table[word] for word in words[i : i + 5])) % 2**64 for i in range(len(words) - 4)]
    return np.array(grams, dtype=np.uint64)


def test_keys_are_shared_by_equal_and_nearly_equal_texts_only():
    base = " ".join(WORDS[:300])
    assert np.array_equal(dedup.exact_keys(base), dedup.exact_keys(base))
    assert dedup.exact_keys(base) != dedup.exact_keys(base + " ")
    assert np.array_equal(dedup.minhash_keys(base), dedup.minhash_keys(base.upper().replace(" ", ",  ")))
    near = dedup.minhash_keys(base.replace(WORDS[150], "other"))
    assert np.isin(dedup.minhash_keys(base), near).any()
    assert not np.isin(dedup.minhash_keys(base), dedup.minhash_keys(" ".join(WORDS[300:]))).any()
    assert len(dedup.minhash_keys("one two")) == 1


def duplicated_corpus(path):
    texts = make_texts(300)
    texts += [texts[7], texts[7], texts[200]]
    near = PROSE.replace("1905", "1950")
    texts = [*texts[:100], PROSE, *texts[100:], PROSE, near, near.upper()]
    return write_jsonl(path, texts), texts


# a bucket size set here does not reach other processes, so the small one is for one worker
@pytest.mark.parametrize(("workers", "bucket_keys"), [(1, 2**22), (2, 2**22), (1, 50)])
def test_exact_duplicates_go_and_the_first_stays_for_any_buckets_and_workers(
    tiny_tokenizer, tmp_path, monkeypatch, bucket_keys, workers
):
    monkeypatch.setattr(dedup, "BUCKET_KEYS", bucket_keys)
    monkeypatch.setattr(dedup, "RUN_KEYS", 20)
    corpus, texts = duplicated_corpus(tmp_path / "web.jsonl")
    out = tmp_path / "out"
    settings = ["deduplicate=exact", "heldout_fraction=0", "shard_bytes=4000"]
    assert main(arguments(corpus, tiny_tokenizer, out, *settings, f"workers={workers}")) == 0
    tokenizer = open_tokenizer(tiny_tokenizer)
    assert [tokenizer.decode(one[:-1]) for one in documents(out, "train")] == list(dict.fromkeys(texts))
    drops = read_manifest(out).provenance["sources"]["web"]["drops"]
    assert drops == {"duplicate": len(texts) - len(set(texts))}
    assert verify(out) == []


def test_keys_get_their_names_whole_and_durable(tmp_path, monkeypatch):
    """A killed build leaves none that a restarted one could take for its own."""
    (scratch := tmp_path / "scratch").mkdir()
    (folder := tmp_path / "keys").mkdir()
    monkeypatch.setattr(dedup, "RUN_KEYS", 20)
    synced = []
    monkeypatch.setattr(dedup, "sync", lambda stream: synced.append(stream.name))
    writer = dedup.KeyWriter(scratch, folder, 3)
    for number in range(50):
        writer.add(number, dedup.exact_keys(f"text {number}"))
    assert list(folder.iterdir()) == []
    assert writer.close() == {"runs": 3, "keys": 50}
    names = [f"000003-{run}.{column}.npy" for run in range(3) for column in ("keys", "numbers")]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(synced) == [str(scratch / name) for name in names]


def test_a_document_takes_bytes_and_no_objects_of_memory_while_keys_are_collected(tmp_path):
    keys = [dedup.exact_keys(f"text {number}") for number in range(20_000)]
    writer = dedup.KeyWriter(tmp_path, tmp_path, 0)
    tracemalloc.start()
    try:
        for number, key in enumerate(keys):
            writer.add(number, key)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 20_000 * 2 * dedup.KEY_BYTES  # arrays grow by an eighth


def test_a_duplicate_takes_few_bytes_of_memory_while_a_bucket_is_compared(tmp_path):
    count = 100_000
    np.save(tmp_path / "000000-0.keys.npy", np.full(count, 7, np.uint64))
    np.save(tmp_path / "000000-0.numbers.npy", np.arange(count, dtype=np.uint32))
    none = np.empty(0, np.uint64)
    dedup.find_duplicates(tmp_path, [1], 0, 1, none)  # loads what numpy loads on first use
    tracemalloc.start()
    try:
        units, numbers, _ = dedup.find_duplicates(tmp_path, [1], 0, 1, none)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not units.any() and numbers.tolist() == list(range(1, count))
    assert peak < 45 * count  # and what the sort takes, which is not traced


def test_what_a_filter_leaves_out_takes_no_equal_with_it(tiny_tokenizer, tmp_path):
    """One source is filtered, the other is not: the text of both stays, from the one that keeps it."""
    first = write_jsonl(tmp_path / "a.jsonl", ["short", "a text that is long enough for the filter"])
    second = write_jsonl(tmp_path / "b.jsonl", ["short", "a text that is long enough for the filter", "other"])
    settings = [f"out={tmp_path / 'out'}", f"tokenizer={tiny_tokenizer}", "deduplicate=exact", "heldout_fraction=0"]
    for name, path in (("a", first), ("b", second)):
        settings += [f"sources.{name}.kind=jsonl", f"sources.{name}.path={path}"]
    assert main(["build", *settings, "sources.a.filters={length: {min_characters: 20}}"]) == 0
    tokenizer = open_tokenizer(tiny_tokenizer)
    found = [tokenizer.decode(one[:-1]) for one in documents(tmp_path / "out", "train")]
    assert found == ["a text that is long enough for the filter", "short", "other"]


@pytest.mark.parametrize(
    "texts",
    [
        ["\U0001f389\U0001f389\U0001f389", "∀∃∈⊂ → ⇔", "x = 1", "x != 1"],
        ["C", "C++", "C#", "c?"],
        ["कि", "की", "कु", "को"],
        ["!", "?", "...", "-", "\u200d", "\U0001f469\u200d\U0001f4bb"],
        ["a b c d", "a, b, c, d", "A b c d", "a b c  d"],
        ["I like this town so much \U0001f389", "I like this town so much \U0001f494"],
        [f"for all x and y of A: {sign}" for sign in ("x ∈ y", "x ∉ y", "x ⊂ y")],
        [" ".join(f"क{sign}" for sign in signs) for signs in ("िीुूे", "ुूेिी", "ेेेेे")],
        ["e\u0301 a b c d e", "e\u0300 a b c d e"],
    ],
)
def test_texts_that_differ_in_what_they_say_are_no_near_duplicates(tiny_tokenizer, tmp_path, texts):
    out = tmp_path / "out"
    corpus = write_jsonl(tmp_path / "web.jsonl", [*texts, *(f"\n{text} " for text in texts)])
    assert main(arguments(corpus, tiny_tokenizer, out, "deduplicate=minhash", "heldout_fraction=0", "workers=1")) == 0
    tokenizer = open_tokenizer(tiny_tokenizer)
    assert [tokenizer.decode(one[:-1]) for one in documents(out, "train")] == texts


def test_words_are_those_of_unicode_in_lower_case():
    assert dedup.words_of("It's foo_bar, 3.14!") == ["it", "s", "foo_bar", "3", "14"]
    assert dedup.words_of("कि की e\u0301A नहीं मि\u200cमि") == ["कि", "की", "e\u0301a", "नहीं", "मि\u200cमि"]
    assert dedup.words_of("\U0001f389\u2764\ufe0f (5€)") == ["\U0001f389", "\u2764\ufe0f", "5", "€"]


def test_the_signature_is_that_of_fineweb_and_finds_pairs_as_often_as_it_says():
    """Penedo et al. 2024, appendix E.1: 5-grams, 112 hashes in 14 bands of 8. 1 - (1 - 0.75^8)^14 = 0.77."""
    assert (dedup.NGRAM_WORDS, dedup.BANDS, dedup.HASHES_OF_BAND) == (5, 14, 8)
    assert dedup.minhash_keys(" ".join(WORDS)).shape == (14,)
    found = {0.5: 0, 0.75: 0, 0.85: 0}
    for similarity in found:
        grams = round(200 * 2 * similarity / (1 + similarity))  # of 200, that both have: grams / (400 - grams)
        for pair in range(150):
            words = [f"a{pair}x{i}" for i in range(204)]
            other = words[: grams + 4] + [f"b{pair}x{i}" for i in range(200 - grams)]
            one, two = (dedup.minhash_keys(" ".join(some)) for some in (words, other))
            found[similarity] += (one == two).any()
    assert found[0.5] <= 0.15 * 150  # expected 0.05
    assert 0.65 * 150 <= found[0.75] <= 0.88 * 150  # expected 0.77; 7 bands of 16 find 0.07, 28 of 4 find all
    assert found[0.85] >= 0.95 * 150  # expected 0.99


def test_near_duplicates_go_and_unlike_texts_stay(tiny_tokenizer, tmp_path):
    texts = [" ".join(np.random.default_rng(i).permutation(WORDS)[:200]) for i in range(50)]
    near = [text.replace(text.split()[100], "changed") for text in texts[:20]]
    corpus = write_jsonl(tmp_path / "web.jsonl", texts + near)
    out = tmp_path / "out"
    settings = ["deduplicate=minhash", "heldout_fraction=0", "shard_bytes=20000"]
    assert main(arguments(corpus, tiny_tokenizer, out, *settings)) == 0
    tokenizer = open_tokenizer(tiny_tokenizer)
    assert [tokenizer.decode(one[:-1]) for one in documents(out, "train")] == texts


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shuffle_keeps_every_document_and_depends_on_the_seed_alone(tiny_tokenizer, tmp_path, monkeypatch, workers):
    """datatrove's default seed gives other bytes at each run."""
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 10_000)
    if workers > 1:
        monkeypatch.setattr(shuffle, "BUCKET_BYTES", 2**27)
    monkeypatch.setattr(shuffle, "RUN_TOKENS", 1000)
    corpus = write_jsonl(tmp_path / "web.jsonl", make_texts(500))
    plain = arguments(corpus, tiny_tokenizer, tmp_path / "plain", "shard_bytes=20000", f"workers={workers}")
    assert main(plain) == 0
    found = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        settings = ["shuffle=true", f"seed={seed}", f"out={tmp_path / name}"]
        assert main([*plain, *settings]) == 0
        assert verify(tmp_path / name) == []
        found[name] = documents(tmp_path / name, "train")
    assert found["one"] == found["again"]
    before = documents(tmp_path / "plain", "train")
    assert sorted(found["one"]) == sorted(before)
    assert found["one"] != before
    place = {tuple(one): i for i, one in enumerate(before)}
    moved = np.array([place[tuple(one)] for one in found["one"]])
    assert abs(np.corrcoef(moved, np.arange(len(moved)))[0, 1]) < 0.2
    assert sorted(found["other"] + documents(tmp_path / "other", "heldout")) == sorted(
        found["one"] + documents(tmp_path / "one", "heldout")
    )
    if workers == 1:
        assert len(open_shards(tmp_path / "one").split("train")) > 3


def test_a_stream_is_shuffled_in_as_many_parts_as_it_is_published_in(tiny_tokenizer, tmp_path):
    """In one part of unknown size the memory would have no bound."""
    (folder := tmp_path / "hub").mkdir()
    texts = make_texts(300)
    for number in range(3):
        rows = pa.table({"text": texts[number * 100 : number * 100 + 100]})
        pq.write_table(rows, folder / f"train-{number:05d}-of-00003.parquet")
    out = tmp_path / "out"
    source = ["sources.s.kind=dataset", f"sources.s.path={folder}", "sources.s.streaming=true"]
    settings = [f"out={out}", f"tokenizer={tiny_tokenizer}", "workers=1", "heldout_fraction=0", "shuffle=true"]
    assert main(["build", *settings, *source]) == 0
    assert len(open_shards(out).split("train")) == 3
    tokenizer = open_tokenizer(tiny_tokenizer)
    found = [tokenizer.decode(one[:-1]) for one in documents(out, "train")]
    assert sorted(found) == sorted(texts) and found != texts


def test_documents_are_gathered_by_two_maps_of_a_unit_however_many_runs_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "RUN_TOKENS", 10)
    scatter = shuffle.Scatter(tmp_path / "unit", 1, np.dtype(np.uint16), [0])
    for number in range(100):
        scatter.add(np.full(5, number), np.array([5]))
    scatter.close(tmp_path)
    mapped = []
    right = np.memmap
    monkeypatch.setattr(shuffle.np, "memmap", lambda *values, **named: mapped.append(values) or right(*values, **named))
    (run,) = shuffle.gather([tmp_path / "unit"], 0, np.dtype(np.uint16), [0])
    assert sorted(run.tokens[::5].tolist()) == list(range(100))
    assert sorted(path.suffix for path, *_ in mapped) == [".lengths", ".npy", ".tokens"]


def sides(folder) -> tuple[set[str], set[str]]:
    tokenizer = open_tokenizer(folder / "tokenizer")
    train, heldout = (
        {tokenizer.decode(one[:-1]) for one in documents(folder, split)} for split in ("train", "heldout")
    )
    return train, heldout


def test_copies_that_differ_in_the_white_space_around_them_are_on_one_side(tiny_tokenizer, tmp_path):
    """83 of 86 held-out documents once stood in train with a newline behind them."""
    texts = make_texts(300)
    around = ["{}", "{}\n", "{}\r\n", " {}", "\n\n{}\t", "{}\u00a0"]
    corpus = write_jsonl(tmp_path / "web.jsonl", [form.format(text) for form in around for text in texts])
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out")) == 0
    train, heldout = ({text.strip() for text in side} for side in sides(tmp_path / "out"))
    assert not train & heldout and len(heldout) > 10
    assert train | heldout == {text.strip() for text in texts}


def test_the_split_of_an_older_folder_is_made_again_by_its_rule(tiny_tokenizer, tmp_path, capsys):
    """Folders made before there was split_by have no such key; which side a text is on may not change as it grows."""
    texts = [f"{text}\n" for text in make_texts(300)]
    corpus = write_jsonl(tmp_path / "web.jsonl", texts)
    out = tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, out, "split_by=text")) == 0
    bound = int(0.1 * 2**64)
    expected = {text for text in texts if xxhash.xxh3_64_intdigest(text.encode(), seed=0) < bound}
    assert sides(out)[1] == expected and expected
    origin = read_manifest(out).provenance["origin"]
    assert "split_by" not in origin["config"] and "cleaning" not in origin
    capsys.readouterr()
    assert main(arguments(corpus, tiny_tokenizer, out, "split_by=text")) == 0
    assert "was built from these inputs and settings already" in capsys.readouterr().out
    assert main(arguments(corpus, tiny_tokenizer, out)) == 2
    error = capsys.readouterr().err
    assert "was made from other inputs, settings or another tokenizer: settings (split_by) differ; " in error
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "new")) == 0
    expected = {text for text in texts if xxhash.xxh3_64_intdigest(text.strip().encode(), seed=0) < bound}
    assert sides(tmp_path / "new")[1] == expected
    assert read_manifest(tmp_path / "new").provenance["origin"]["config"]["split_by"] == "stripped"


@pytest.mark.parametrize("setting", ["deduplicate=minhash", "sources.web.filters={c4: {}}"])
def test_a_build_never_mixes_two_versions_of_the_rules(tiny_tokenizer, tmp_path, capsys, monkeypatch, setting):
    corpus = write_jsonl(tmp_path / "web.jsonl", ["One. Two. Three. Four. Five."] * 3 + [""] * 3)
    settings = arguments(corpus, tiny_tokenizer, tmp_path / "out", setting, "workers=1", "max_bad_fraction=0")
    with monkeypatch.context() as older:
        older.setattr("data_pipeline.write.manifest.CLEANING", 1)
        older.setattr("data_pipeline.build.pipeline.finish", lambda *_: exit(9))
        with pytest.raises(SystemExit):
            main(settings)
    capsys.readouterr()
    assert main(settings) == 2
    error = capsys.readouterr().err
    assert "holds an unfinished build from other settings (the rules of filters and near duplicates of another" in error
