"""What is left out of the web: other languages, blocked sites, addresses of people; each with its counts."""

import gzip
import json
import random
import re
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.clean.filters import chosen
from data_pipeline.clean.personal import personal
from data_pipeline.clean.weblists import block_lists
from data_pipeline.cli import main
from data_pipeline.tokenize.tokenizer import open_tokenizer
from ponder_scale.errors import ConfigError
from ponder_scale.shards.manifest import read_manifest
from tests.data_pipeline.builds import arguments, documents, write_jsonl
from tests.export.versions import CACHE, install

ENGLISH = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all today."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, und der Hund hat nichts dagegen."
FRENCH = "Le renard brun et rapide saute par-dessus le chien paresseux, qui n'y voit pas de mal."


@pytest.fixture(scope="module")
def py3langid():
    folder = CACHE / "py3langid-0.4.0"
    install(folder, "--no-deps", "py3langid==0.4.0")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("py3langid")]:
        del sys.modules[name]


def texts_of(out) -> list[str]:
    tokenizer = open_tokenizer(out / "tokenizer")
    return [tokenizer.decode(one[:-1]) for one in documents(out, "train")]


def sources_of(out) -> dict:
    return read_manifest(out).provenance["sources"]["web"]


def test_texts_in_other_languages_are_dropped_and_counted_by_language(tiny_tokenizer, tmp_path, capsys, py3langid):
    corpus = write_jsonl(tmp_path / "web.jsonl", [ENGLISH, GERMAN, FRENCH, "ok", GERMAN + "!", FRENCH + "?"])
    common = ["heldout_fraction=0", "workers=1", "keep_dropped=true"]
    keep = "sources.web.filters={language: {keep: [en, de]}}"
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", keep, *common)) == 0
    assert texts_of(tmp_path / "out") == [ENGLISH, GERMAN, GERMAN + "!"]
    assert sources_of(tmp_path / "out")["drops"] == {"language: fr": 2, "language: unsure": 1}
    assert "dropped from web: 2 language: fr" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out").provenance["origin"]["filters"] == {"web": {"language": "py3langid 0.4.0"}}
    (screen,) = chosen("web", {"language": {"keep": ["en"], "min_score": 0.999999}})
    assert screen(ENGLISH) == "language: unsure"
    (screen,) = chosen("web", {"language": {"keep": ["en"], "characters": len(ENGLISH)}})
    assert screen(ENGLISH + GERMAN * 9) is None
    for thresholds, message in (
        ("{}", r"language: keep is None; expected a list of languages, such as \[en, de\]"),
        ("{keep: en}", "language: keep is 'en'; expected a list of languages"),
        ("{keep: [english]}", "language: keep: 'english' is not a language of py3langid; expected some of: ace, af"),
        ("{keep: [en], min_score: high}", "language.min_score is 'high'; expected a number, at least 0"),
    ):
        capsys.readouterr()
        settings = f"sources.web.filters={{language: {thresholds}}}"
        assert main(arguments(corpus, tiny_tokenizer, tmp_path / "other", settings, *common)) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1


def test_the_library_that_tells_languages_is_named_where_it_is_missing(tiny_tokenizer, tmp_path, capsys, monkeypatch):
    from data_pipeline.clean import language

    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    corpus = write_jsonl(tmp_path / "web.jsonl", [ENGLISH])
    settings = "sources.web.filters={language: {keep: [en]}}"
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", settings, "workers=1")) == 2
    error = capsys.readouterr().err
    assert "sources.web.filters.language: the language filter needs py3langid; run: pip install" in error
    assert "ponder-scale[filters]" in error and error.count("\n") == 1


BLOCKED = """
# what is not wanted
bad.example
0.0.0.0 ads.example   # as of a hosts file
fine.example/bad/
http://fine.example/one?page=2
192.0.2.7
münchen.example
"""
URLS = {  # and whether they are blocked
    "https://bad.example/": True,
    "http://www.sub.BAD.example:8080/x?y#z": True,
    "bad.example/x": True,
    "https://user:word@bad.example./": True,
    "https://notbad.example/": False,
    "https://bad.example.org/": False,
    "https://org/bad.example": False,
    "https://x.ads.example": True,
    "https://fine.example/": False,
    "https://fine.example/bad": True,
    "https://fine.example/bad/deep/er?x": True,
    "https://www.fine.example/bad/x": True,
    "https://other.fine.example/bad": False,
    "https://fine.example/badly": False,
    "https://fine.example/one": False,
    "https://fine.example/one?page=2": True,
    "https://fine.example/one?page=3": False,
    "http://192.0.2.7/": True,
    "http://1.192.0.2.7/": False,
    "http://2.7/": False,
    "https://www.xn--mnchen-3ya.example/": True,
    "https://MÜNCHEN.example/": True,
    "http://[::1]:80/": False,
    "http://[bad": False,
    "not a url": False,
}


@pytest.mark.parametrize("address", URLS)
def test_a_list_blocks_domains_with_all_below_and_addresses_with_all_behind(address, tmp_path):
    (tmp_path / "list.txt").write_text(BLOCKED)
    assert block_lists((str(tmp_path / "list.txt"),)).hit(address) == ("list.txt" if URLS[address] else None)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_documents_of_blocked_urls_are_dropped_and_counted_by_list(tiny_tokenizer, tmp_path, capsys, kind):
    for name, lines in (("adult/domains", "bad.example\n"), ("spam/domains.gz", "spam.example\nbad.example\n")):
        (tmp_path / name).parent.mkdir()
        content = lines.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    urls = ["http://a.example", "http://bad.example/x", "http://spam.example", None, " ", "http://b.example"]
    rows = [{"text": f"document {i}", "meta": {"url": url}} for i, url in enumerate(urls)]
    if kind == "jsonl":
        rows += [{"text": "document 6", "meta": 5}, {"text": "document 7"}]
        (tmp_path / "web").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "web")
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(str(tmp_path / "web"))
    block = f"block: [{tmp_path}/adult/*, {tmp_path}/spam/domains.gz]"
    settings = [f"sources.web.kind={kind}", "heldout_fraction=0", "workers=1", "deduplicate=exact", "keep_dropped=true"]
    url = f"sources.web.filters={{url: {{field: meta.url, {block}}}}}"
    assert main(arguments(tmp_path / "web", tiny_tokenizer, tmp_path / "out", url, *settings)) == 0
    assert texts_of(tmp_path / "out") == ["document 0", "document 5"]
    missing = 4 if kind == "jsonl" else 2
    expected = {"url: domains": 1, "url: domains.gz": 1, "url: none in the record": missing}
    assert sources_of(tmp_path / "out")["drops"] == expected
    assert len((tmp_path / "out" / "dropped.jsonl").read_text().splitlines()) == missing + 2
    learn = ["train-tokenizer", url, *settings[:1], f"sources.web.path={tmp_path / 'web'}", "--vocab-size", "260"]
    assert main([*learn, "--out", str(tmp_path / "new")]) == 0
    assert "learned from web: 2 documents" in capsys.readouterr().out
    assert main(["plan", *arguments(tmp_path / "web", tiny_tokenizer, tmp_path / "x", url, *settings)[1:]]) == 0
    assert "url: none in the record" in capsys.readouterr().out
    (tmp_path / "adult" / "domains").write_text("other.example\n")
    assert main(arguments(tmp_path / "web", tiny_tokenizer, tmp_path / "out", url, *settings)) == 2
    assert "settings (files that filters read) differ" in capsys.readouterr().err
    if kind != "jsonl":
        wrong = f"sources.web.filters={{url: {{field: link, {block}}}}}"
        assert main(arguments(tmp_path / "web", tiny_tokenizer, tmp_path / "x", wrong, *settings)) == 2
        assert "sources.web.filters.url.field is 'link'; the columns of" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_blocked_url_takes_no_duplicate_with_it(tiny_tokenizer, tmp_path, workers):
    (tmp_path / "list").write_text("bad.example")
    rows = [{"text": f"document {i % 50}", "url": f"http://{'bad' if i < 20 else 'good'}.example"} for i in range(100)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"sources.web.filters={{url: {{block: ['{tmp_path}/list']}}}}", "deduplicate=exact", "shard_bytes=900"]
    more = ["heldout_fraction=0", f"workers={workers}"]
    assert main(arguments(tmp_path / "web.jsonl", tiny_tokenizer, tmp_path / "out", *settings, *more)) == 0
    assert sorted(texts_of(tmp_path / "out")) == sorted({row["text"] for row in rows})
    assert sources_of(tmp_path / "out")["drops"] == {"duplicate": 30, "url: list": 20}


@pytest.mark.parametrize(
    ("thresholds", "kind", "message"),
    [
        ("{}", "jsonl", "sources.web.filters.url.block names no block list; give a list of files"),
        ("{block: list}", "jsonl", "sources.web.filters.url.block names no block list; give a list of files"),
        ("{block: [nothing]}", "jsonl", "url: nothing: no such file"),
        ("{block: [LIST], field: 3}", "jsonl", "sources.web.filters.url.field is 3; expected text"),
        ("{block: [LIST], deny: x}", "jsonl", "url.deny: unknown threshold; expected one of: field, block"),
        (
            "{block: [LIST]}",
            "text",
            "files of kind=text have no URL for a document; remove this filter",
        ),
        ("{block: [WRONG]}", "jsonl", "wrong, line 2 is '||bad.example^'; expected a domain, or an address and path"),
    ],
)
def test_a_block_list_that_cannot_be_used_is_one_clear_line(
    tiny_tokenizer, tmp_path, capsys, thresholds, kind, message
):
    (tmp_path / "list").write_text("bad.example")
    (tmp_path / "wrong").write_text("bad.example\n||bad.example^\n")
    corpus = write_jsonl(tmp_path / "web.jsonl", ["some text"])
    for name in ("list", "wrong"):
        thresholds = thresholds.replace(name.upper(), str(tmp_path / name))
    settings = [f"sources.web.filters={{url: {thresholds}}}", f"sources.web.kind={kind}", "workers=1"]
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", *settings)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


PERSONAL = {  # and what it becomes, E for an e-mail address and I for an IP address
    "write to bob@site.org.": "write to E.",
    "<Bob.Smith+tag@mail.co.uk>, 'a_b%c@x-y.museum'; mailto:x@y.de": "<E>, 'E'; mailto:E",
    "...bob@site.org... bob@site.org- bob@site.org_ bob@site.org,ann@site.org": "E... E- E_ E,E",
    "größe@bücher.de und 李@公司.中国": "E und E",
    "@handle a@b @ b@ x@y@z.org user@localhost foo@1.2": "@handle a@b @ b@ x@E user@localhost foo@1.2",
    "name@example.com name@sub.example.org n@host.test n@notexample.com": (
        "name@example.com name@sub.example.org n@host.test E"
    ),
    "git@github.com:x/y.git": "E:x/y.git",
    "8.8.8.8, IP:8.8.4.4 (1.1.1.1:53) 9.9.9.9.": "I, IP:I (I:53) I.",
    "10.0.0.1 192.168.1.1 127.0.0.1 192.0.2.1 224.0.0.1 0.0.0.0 999.8.8.8": (
        "10.0.0.1 192.168.1.1 127.0.0.1 192.0.2.1 224.0.0.1 0.0.0.0 999.8.8.8"
    ),
    "version 1.2.3.4.5 or v8.8.8.8 or 8.8.8 or 8.8.8.8x": "version 1.2.3.4.5 or v8.8.8.8 or 8.8.8 or 8.8.8.8x",
    "2001:4860:4860::8888, [2A00:1450:4001:80b::200e]:443 2606:4700:4700::1111: yes 2a00::": "I, [I]:443 I: yes I",
    "::1 fe80::1 2001:db8::1 std::vector abc::def 12:30:45 2023:10:05 12:30": (
        "::1 fe80::1 2001:db8::1 std::vector abc::def 12:30:45 2023:10:05 12:30"
    ),
}


@pytest.mark.parametrize("text", PERSONAL)
def test_addresses_of_people_and_public_machines_are_replaced(text):
    expected = PERSONAL[text]
    found, counts = personal(text)
    assert found == expected.replace("E", "email@example.com").replace("I", "192.0.2.1").replace("192.0.2.1P:", "IP:")
    assert counts.get("e-mail addresses", 0) == expected.count("E")
    assert counts.get("IP addresses", 0) == expected.replace("IP", "").count("I")
    assert personal(found) == (found, {})


def test_addresses_are_looked_for_in_a_time_as_the_length_of_the_text():
    pieces = ["a", "a.", "a@", "a@a.", "1.", "1.1.1.1", "2001:", "2a00::", ":", "-", "_", "é", "+@"]
    texts = [piece * (400_000 // len(piece)) for piece in pieces] + ["a@" + "a-" * 200_000, "a@" + "a." * 200_000]
    texts.append("".join(random.Random(0).choices("a1.@:-2", k=400_000)))
    for text in texts:
        begin = time.process_time()
        personal(text)
        assert time.process_time() - begin < 20, text[:20]  # a quadratic one takes minutes


def test_replaced_addresses_are_counted_and_the_texts_go_on_to_filters(tiny_tokenizer, tmp_path, capsys):
    mail = "Write to {} soon."
    texts = [mail.format(name) for name in ("ann@site.org", "bob@site.org", "the shop")] + ["from 8.8.8.8", "10.0.0.1"]
    corpus = write_jsonl(tmp_path / "web.jsonl", texts)
    common = ["heldout_fraction=0", "workers=1", "deduplicate=exact"]
    for filters, expected, counts in (
        ("{}", [mail.format("email@example.com"), texts[2], "from 192.0.2.1", "10.0.0.1"], (2, 1)),
        ("{email: '<E>', ip: null}", [mail.format("<E>"), *texts[2:]], (2, 0)),
        ("{email: null, ip: ''}", [*texts[:3], "from ", "10.0.0.1"], (0, 1)),
    ):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        capsys.readouterr()
        assert main(arguments(corpus, tiny_tokenizer, out, f"sources.web.filters={{pii: {filters}}}", *common)) == 0
        assert texts_of(out) == expected
        names = dict(zip(("e-mail addresses", "IP addresses"), counts, strict=True))
        assert sources_of(out)["replaced"] == {name: count for name, count in sorted(names.items()) if count}
        said = capsys.readouterr().out
        assert all(f"replaced in documents of web: {n} {name} (pii)" in said for name, n in names.items() if n)
        assert main(["inspect", str(out), "--samples", "0"]) == 0
        said = capsys.readouterr().out
        assert all(f"replaced: {n} {name}" in said for name, n in names.items() if n)
    with pytest.raises(ConfigError, match=r"filters.pii.email is 5; expected text"):
        chosen("web", {"pii": {"email": 5}})
    with pytest.raises(ConfigError, match=r"filters.pii.phone: unknown threshold; expected one of: email, ip"):
        chosen("web", {"pii": {"phone": "x"}})
