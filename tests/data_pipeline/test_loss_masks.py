"""Builds of sources in which not everything counts in the loss: what the records say is what the mask says."""

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline.cli import main
from data_pipeline.tokenize.backends import _byte_of_character
from ponder_scale.shards.manifest import read_manifest, verify
from tests.data_pipeline.builds import adopt, contents, make_texts
from tests.data_pipeline.masked import build, documents, write

PAIR = ["sources.chat.loss={prompt: prompt, completion: completion}"]
SPANS = ["sources.chat.loss.spans=spans"]


def pairs(count, seed=0):
    generator = np.random.default_rng(seed)
    texts = make_texts(count, seed)
    cuts = [int(generator.integers(0, len(text))) for text in texts]  # also within words
    return [{"prompt": text[:cut], "completion": text[cut:]} for text, cut in zip(texts, cuts, strict=True)]


def spanned(count, seed=0):
    """Texts with up to four spans in any order, over each other too, one of which is not empty."""
    generator = np.random.default_rng(seed)
    records = []
    for text in make_texts(count, seed):
        places = np.sort(generator.integers(0, len(text) + 1, (int(generator.integers(0, 4)), 2)), axis=1).tolist()
        first = int(generator.integers(0, len(text)))
        places.insert(int(generator.integers(0, len(places) + 1)), [first, first + 1])
        records.append({"text": text, "spans": places})
    return records


class Bytes:
    """The bytes of each token of a byte-level tokenizer, which no code of ours is asked for but one table."""

    def __init__(self, folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        table = _byte_of_character()
        self.eod = content["added_tokens"][0]["id"]
        self.of = {
            number: bytes(table[character] for character in token)
            for token, number in content["model"]["vocab"].items()
            if number != self.eod
        }

    def expected(self, tokens, text, spans):
        """Which tokens count: those whose bytes all lie in a span; none lies on both sides of an end of one."""
        counting = np.zeros(len(text.encode()), dtype=bool)
        for begin, end in spans:
            counting[len(text[:begin].encode()) : len(text[:end].encode())] = True
        assert b"".join(self.of[token] for token in tokens[:-1]) == text.encode() and tokens[-1] == self.eod
        found, place = [], 0
        for token in tokens[:-1]:
            of_token = set(counting[place : place + len(self.of[token])].tolist())
            assert len(of_token) == 1
            found.append(of_token.pop())
            place += len(self.of[token])
        return [*found, bool(counting[-1])]  # the end token goes with the end of the text


@pytest.mark.parametrize("more", [[], ["shuffle=true"], ["shard_tokens=500", "backend=reference"]])
def test_the_completion_and_its_end_count_and_the_prompt_does_not(more, tiny_tokenizer, tmp_path):
    records = pairs(300)
    assert build(write(tmp_path / "a.jsonl", records), tiny_tokenizer, tmp_path / "out", *PAIR, *more) == 0
    tokens_of, left = Bytes(tiny_tokenizer), Counter(r["prompt"] + r["completion"] for r in records)
    prompts = {r["prompt"] + r["completion"]: len(r["prompt"]) for r in records}
    for tokens, counts in documents(tmp_path / "out"):
        text = b"".join(tokens_of.of[token] for token in tokens[:-1]).decode()
        left[text] -= 1
        assert counts == tokens_of.expected(tokens, text, [(prompts[text], len(text))]) and counts[-1]
    assert not left.total() and verify(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "dataset"])
def test_the_characters_in_spans_count_whatever_file_says_so(kind, tiny_tokenizer, tmp_path):
    records = spanned(120)
    path = write(tmp_path / "a.jsonl", records)
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=50)
    elif kind == "dataset":
        import datasets

        path = tmp_path / "set"
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    elif kind == "jsonl.gz":
        import gzip

        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert build(path, tiny_tokenizer, tmp_path / "out", *SPANS, kind=kind.removesuffix(".gz")) == 0
    tokens_of, found = Bytes(tiny_tokenizer), list(documents(tmp_path / "out"))
    assert len(found) == len(records)
    for (tokens, counts), record in zip(found, records, strict=True):
        assert counts == tokens_of.expected(tokens, record["text"], record["spans"])


def test_prompt_and_completion_are_read_from_parquet_and_from_nested_fields(tiny_tokenizer, tmp_path):
    records = pairs(50)
    nested = [{"data": record, "id": number} for number, record in enumerate(records)]
    write(tmp_path / "a.jsonl", nested)
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "a.parquet")
    more = ["sources.chat.loss={prompt: data.prompt, completion: data.completion}"]
    shards = []
    for kind in ("jsonl", "parquet"):
        assert build(tmp_path / f"a.{kind}", tiny_tokenizer, tmp_path / kind, *more, kind=kind) == 0
        shards.append({name: what for name, what in contents(tmp_path / kind).items() if name.startswith("train-")})
    assert shards[0] == shards[1] and any(name.endswith(".mask") for name in shards[0])


def test_a_first_token_that_is_put_before_a_document_does_not_count(tiny_tokenizer, tmp_path):
    records = [{"text": "abc", "spans": [[0, 3]]}, {"text": "abc", "spans": [[0, 1]]}]
    more = [*SPANS, "bos_token=<|endoftext|>"]
    assert build(write(tmp_path / "a.jsonl", records), tiny_tokenizer, tmp_path / "out", *more) == 0
    (_, first), (_, second) = documents(tmp_path / "out")
    assert not first[0] and all(first[1:]) and not second[0] and second[1] and not any(second[2:])
    assert build(tmp_path / "a.jsonl", tiny_tokenizer, tmp_path / "endless", *SPANS, "append_eod=false") == 0
    assert all(next(documents(tmp_path / "endless"))[1])


def test_records_that_do_not_say_what_counts_are_bad_and_those_in_which_nothing_does_are_dropped(
    tiny_tokenizer, tmp_path, capsys
):
    bad_spans = ["x", None, {}, [1, 2], [[0]], [[0, 9]], [[-1, 2]], [[2, 1]], [[0, True]], [[0.0, 1]], [["0", "1"]]]
    bad = [{"text": "abc", "spans": spans} for spans in bad_spans] + [{"text": "abc"}, {"text": 7, "spans": []}, [1]]
    dropped = [{"text": "abc", "spans": []}, {"text": "abc", "spans": [[1, 1]]}, {"text": " ", "spans": [[0, 1]]}]
    good = [{"text": f"abc {number}", "spans": [[0, 1], [1, 2]]} for number in range(3)]
    path = write(tmp_path / "a.jsonl", [*bad, *dropped, *good])
    assert build(path, tiny_tokenizer, tmp_path / "out", *SPANS, "max_bad_fraction=1") == 0
    drops = read_manifest(tmp_path / "out").provenance["sources"]["chat"]["drops"]
    assert drops == {
        "empty": 1,
        "field is not a string": 1,
        "field missing": 1,
        "not a JSON object": 1,
        "nothing in it counts in the loss": 2,
        "spans are not pairs of places in the text": len(bad_spans),
    }
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == len(bad)  # what is dropped is nobody's fault
    assert len(list(documents(tmp_path / "out"))) == 3

    more = [{"prompt": "a", "completion": ""}, {"prompt": "a"}, {"prompt": None, "completion": "b"}]
    more += [
        {"prompt": "", "completion": "b"},
        {"prompt": "", "completion": ""},
        {"prompt": "a" * 40, "completion": "b"},
    ]
    path = write(tmp_path / "b.jsonl", more)
    assert build(path, tiny_tokenizer, tmp_path / "two", *PAIR, "max_bad_fraction=1", "max_document_bytes=40") == 0
    assert read_manifest(tmp_path / "two").provenance["sources"]["chat"]["drops"] == {
        "empty": 1,
        "field is not a string": 1,
        "field missing": 1,
        "longer than max_document_bytes": 1,
        "nothing in it counts in the loss": 1,
    }
    ((tokens, counts),) = documents(tmp_path / "two")
    assert counts == [True] * len(tokens)
    capsys.readouterr()


def test_a_source_without_a_mask_beside_one_with_a_mask_keeps_every_byte(tiny_tokenizer, tmp_path, capsys):
    chat = write(tmp_path / "chat.jsonl", pairs(100))
    web = write(tmp_path / "web.jsonl", [{"text": text} for text in make_texts(100, 1)])
    plain = ["sources.web.kind=jsonl", f"sources.web.path={web}"]
    alone = ["build", f"out={tmp_path / 'alone'}", f"tokenizer={tiny_tokenizer}", *plain, "heldout_fraction=0.1"]
    assert main(alone) == 0
    assert build(chat, tiny_tokenizer, tmp_path / "both", *PAIR, *plain, "heldout_fraction=0.1") == 0
    manifest = read_manifest(tmp_path / "both")
    masked = {info.source for infos in manifest.splits.values() for info in infos if info.mask_hash is not None}
    assert masked == {"chat"} and manifest.version == 3 and read_manifest(tmp_path / "alone").version == 2
    assert "loss" not in read_manifest(tmp_path / "alone").provenance["origin"]["config"]["sources"]["web"]
    for split in ("train", "heldout"):
        names = [info.name for info in manifest.splits[split] if info.source == "web"]
        for suffix in ("bin", "idx"):
            own = (tmp_path / "alone" / f"{split}-00000.{suffix}").read_bytes()
            assert own == (tmp_path / "both" / f"{names[0]}.{suffix}").read_bytes()
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "both")]) == 0
    printed = capsys.readouterr().out
    for split in ("train", "heldout"):
        infos = [info for info in manifest.splits[split] if info.source == "chat"]
        counted, tokens = sum(info.counted for info in infos), sum(info.tokens for info in infos)
        assert f"of chat {counted:,} tokens count in the loss, {counted / tokens:.1%}" in printed
    assert "of web " not in printed


def test_a_build_with_masks_is_the_same_for_any_workers_and_another_mask_is_another_build(
    tiny_tokenizer, tmp_path, capsys
):
    path = write(tmp_path / "a.jsonl", spanned(400))
    many = [*SPANS, "shard_bytes=4000", "deduplicate=exact"]
    assert build(path, tiny_tokenizer, tmp_path / "one", *many) == 0
    assert build(path, tiny_tokenizer, tmp_path / "two", *many, "workers=2") == 0
    one, two = ({k: v for k, v in contents(tmp_path / n).items() if k != "manifest.json"} for n in ("one", "two"))
    assert one == two and sum(name.endswith(".mask") for name in one) > 3
    assert read_manifest(tmp_path / "one").identity == read_manifest(tmp_path / "two").identity
    assert build(path, tiny_tokenizer, tmp_path / "one", "shard_bytes=4000", "deduplicate=exact") == 2
    assert "sources" in capsys.readouterr().err
    assert build(path, tiny_tokenizer, tmp_path / "one", "deduplicate=exact", "overwrite=true") == 0
    assert not list((tmp_path / "one").glob("*.mask")) and verify(tmp_path / "one") == []
    assert not (tmp_path / "one.replaced").exists()  # its masks went with it, as files of its own


def test_a_dropped_document_is_written_with_its_spans_and_can_be_read_again(tiny_tokenizer, tmp_path):
    records = spanned(40)
    path = write(tmp_path / "a.jsonl", [*records, *records])
    assert build(path, tiny_tokenizer, tmp_path / "out", *SPANS, "deduplicate=exact", "keep_dropped=true") == 0
    again = tmp_path / "out" / "dropped.jsonl"
    assert build(again, tiny_tokenizer, tmp_path / "again", *SPANS) == 0
    assert list(documents(tmp_path / "again")) == list(documents(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["megatron", "raw"])
def test_a_mask_beside_adopted_tokens_is_taken_along_and_one_that_is_none_is_refused(
    kind, tiny_tokenizer, tmp_path, capsys
):
    out = tmp_path / "out"
    assert build(write(tmp_path / "a.jsonl", pairs(30)), tiny_tokenizer, out, *PAIR) == 0
    more = ["--dtype", "uint16"] if kind == "raw" else []
    assert adopt([out / "train-00000.bin"], kind, tiny_tokenizer, tmp_path / "adopted", *more) == 0
    assert list(documents(tmp_path / "adopted")) == list(documents(out)) and verify(tmp_path / "adopted") == []
    assert (
        read_manifest(tmp_path / "adopted").splits["train"][0].counted == read_manifest(out).splits["train"][0].counted
    )
    shutil.copytree(out, tmp_path / "other")
    with (tmp_path / "other" / "train-00000.mask").open("ab") as stream:
        stream.write(b"\0")
    capsys.readouterr()
    assert adopt([tmp_path / "other" / "train-00000.bin"], kind, tiny_tokenizer, tmp_path / "refused", *more) == 2
    assert "train-00000.mask: lies beside train-00000.bin, but is not a mask" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def metaspace(folder):
    """A tokenizer that puts a space before each text, as those of Llama 2 and Mistral do."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(make_texts(50), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def prefixed(folder):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(make_texts(50), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("make", [metaspace, prefixed])
def test_a_tokenizer_that_puts_something_before_each_piece_is_refused(make, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", pairs(30))
    assert build(path, make(tmp_path / "tokenizer"), tmp_path / "out", *PAIR) == 2
    error = capsys.readouterr().err
    assert "do not become the text" in error and "a text cannot be cut where it begins to count in the loss" in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (
            ["sources.chat.loss={prompt: prompt}"],
            "jsonl",
            "sources.chat.loss is {'prompt': 'prompt'}; expected {prompt: FIELD, completion: FIELD}, {spans: FIELD} or",
        ),
        (["sources.chat.loss={prompt: a, completion: a}"], "jsonl", "expected {prompt: FIELD"),
        (["sources.chat.loss={prompt: a, completion: b, spans: c}"], "jsonl", "expected {prompt: FIELD"),
        (["sources.chat.loss={}"], "jsonl", "expected {prompt: FIELD"),
        (["sources.chat.loss={span: a}"], "jsonl", "did you mean sources.chat.loss.spans?"),
        (SPANS, "text", "sources.chat.loss: kind text has no fields that could say what counts"),
        ([*SPANS, "sources.chat.filters={c4: {}}"], "jsonl", "sources.chat.loss: the filters c4 and pii change texts"),
        ([*SPANS, "sources.chat.filters={pii: {}}"], "jsonl", "so the characters that count could not be found again"),
        (
            ["sources.chat.loss={prompt: prompt, completion: answer}"],
            "parquet",
            "loss.completion is 'answer'; the columns",
        ),
        (SPANS, "parquet", "sources.chat.field is 'text'; the columns of"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_sentence(more, kind, message, tiny_tokenizer, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", pairs(3))
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(pairs(3)), path)
    assert build(path, tiny_tokenizer, tmp_path / "out", *more, kind=kind) == 2
    assert message in capsys.readouterr().err
