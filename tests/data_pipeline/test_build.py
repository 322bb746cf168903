import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from data_pipeline.cli import main
from data_pipeline.tokenize.tokenizer import open_tokenizer
from data_pipeline.write.output import PartWriter
from ponder_scale.shards.format import open_shards
from ponder_scale.shards.manifest import hash_file, read_manifest, verify
from tests.data_pipeline.builds import arguments, contents, documents, make_texts, write_jsonl


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "web.jsonl", make_texts(300))


def test_the_shards_hold_each_document_tokenized_and_ended(corpus, tiny_tokenizer, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, out)) == 0
    tokenizer = open_tokenizer(tiny_tokenizer)
    expected = []
    for text in make_texts(300):
        tokens, _ = tokenizer.encode_batch([text])
        expected.append([*tokens.tolist(), tokenizer.eod_id])
    train, heldout = documents(out, "train"), documents(out, "heldout")
    assert sorted(train + heldout) == sorted(expected)
    assert train == [document for document in expected if document in train]
    assert 10 <= len(heldout) <= 55
    assert verify(out) == []


def test_the_manifest_says_what_made_the_shards(corpus, tiny_tokenizer, tmp_path):
    with corpus.open("a") as stream:
        stream.write('{"text": ""}\n{"text": 1}\n')
    out = tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, out, "max_bad_fraction=0.01")) == 0
    manifest = read_manifest(out)
    tokenizer = open_tokenizer(tiny_tokenizer)
    assert (manifest.dtype, manifest.vocab_size, manifest.eod_id) == ("uint16", 300, tokenizer.eod_id)
    assert manifest.provenance["sources"] == {
        "web": {
            "documents": 300,
            "files": 1,
            "bytes": corpus.stat().st_size,
            "drops": {"empty": 1, "field is not a string": 1},
        }
    }
    assert manifest.provenance["command"].startswith("ponder-data build out=")
    (quarantined,) = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    offset = corpus.read_text().encode().index(b'{"text": 1}')
    assert quarantined == {
        "source": "web",
        "file": str(corpus),
        "offset": offset,
        "reason": "field is not a string",
    }
    (read,) = [json.loads(line) for line in (out / "inputs.jsonl").read_text().splitlines()]
    digest = hash_file(corpus)
    size = corpus.stat().st_size
    assert read == {"source": "web", "file": str(corpus), "begin": 0, "end": size, "bytes": size, "xxh3": digest}
    assert sorted(path.name for path in (out / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_documents_need_no_end(corpus, tiny_tokenizer, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, out, "append_eod=false")) == 0
    eod = open_tokenizer(tiny_tokenizer).eod_id
    assert read_manifest(out).eod_id is None
    assert not any(eod in document for document in documents(out, "train"))


def test_shards_close_at_their_size_and_hold_the_same_documents(corpus, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.build.shard.BATCH_DOCUMENTS", 7)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(corpus, tiny_tokenizer, whole)) == 0
    assert main(arguments(corpus, tiny_tokenizer, parts, "shard_tokens=1000")) == 0
    assert documents(parts, "train") == documents(whole, "train")
    shards = open_shards(parts).split("train")
    assert [shard.info.name for shard in shards] == [
        "train-00000",
        *(f"train-00000-{i}" for i in range(1, len(shards))),
    ]
    assert len(shards) > 5
    assert all(1000 <= shard.info.tokens < 1000 + shard.lengths[-1] for shard in shards[:-1])
    assert verify(parts) == []


@pytest.mark.parametrize("records", [1, 64])
def test_the_same_build_gives_the_same_bytes_for_any_batches(corpus, tiny_tokenizer, tmp_path, monkeypatch, records):
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "a", "shard_tokens=3000")) == 0
    monkeypatch.setattr("data_pipeline.build.shard.BATCH_DOCUMENTS", records)
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "b", "shard_tokens=3000")) == 0
    one, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert one.pop("manifest.json") != other.pop("manifest.json")  # the command names its folder
    assert one == other


def test_held_out_documents_stay_held_out_as_data_grows(tiny_tokenizer, tmp_path):
    texts = make_texts(400)
    splits = {}
    for name, some in {"small": texts[100:300], "large": texts[::-1]}.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", some)
        assert main(arguments(path, tiny_tokenizer, tmp_path / name)) == 0
        splits[name] = {split: documents(tmp_path / name, split) for split in ("train", "heldout")}
    for split in ("train", "heldout"):
        assert all(document in splits["large"][split] for document in splits["small"][split])


def test_another_seed_holds_out_other_documents(corpus, tiny_tokenizer, tmp_path):
    for seed in (0, 1):
        assert main(arguments(corpus, tiny_tokenizer, tmp_path / str(seed), f"seed={seed}")) == 0
    assert documents(tmp_path / "0", "heldout") != documents(tmp_path / "1", "heldout")


def test_several_sources_are_read_in_their_order(tiny_tokenizer, tmp_path):
    (tmp_path / "b.txt").write_text("from a text file")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "c.txt").write_text("from a folder")
    out = tmp_path / "out"
    sources = [
        "sources.z.kind=text",
        f"sources.z.path={tmp_path / 'b.txt'}",
        "sources.a.kind=folder",
        f"sources.a.path={tmp_path / 'tree'}",
    ]
    assert main(["build", f"out={out}", f"tokenizer={tiny_tokenizer}", "heldout_fraction=0", *sources]) == 0
    tokenizer = open_tokenizer(out / "tokenizer")
    assert [tokenizer.decode(document[:-1]) for document in documents(out, "train")] == [
        "from a text file",
        "from a folder",
    ]
    assert open_shards(out).split("heldout") == []


def test_a_finished_build_is_not_repeated_and_not_overwritten(corpus, tiny_tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    same = arguments(corpus, tiny_tokenizer, out)
    assert main(same) == 0
    before = contents(out)
    assert main(same) == 0
    assert "was built from these inputs and settings already" in capsys.readouterr().out
    write_jsonl(corpus, make_texts(100))
    assert main(same) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert contents(out) == before
    assert main([*same, "overwrite=true"]) == 0
    assert len(documents(out, "train")) < 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "web.jsonl"]


def test_another_end_of_documents_is_another_build(corpus, tiny_tokenizer, tmp_path, capsys):
    """The file beside the tokenizer's that names it may change, while the tokens of texts do not."""
    shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    same = arguments(corpus, tmp_path / "tokenizer", tmp_path / "out")
    assert main(same) == 0
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "!"}))
    assert main(same) == 2
    assert "made from other inputs, settings or another tokenizer" in capsys.readouterr().err


def test_sources_have_weights_all_or_none(corpus, tiny_tokenizer, tmp_path, capsys):
    second = ["sources.other.kind=jsonl", f"sources.other.path={corpus}"]
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", *second, "sources.web.weight=1")) == 2
    said = capsys.readouterr().err
    assert "sources.other.weight is null, while other sources have a weight; give all of them one, or none" in said


def test_a_document_ends_as_asked_and_is_shown_so(corpus, tiny_tokenizer, tmp_path, capsys):
    (tokenizer := tmp_path / "tokenizer").mkdir()
    content = (tiny_tokenizer / "tokenizer.json").read_text().replace("<|endoftext|>", "[END]")
    (tokenizer / "tokenizer.json").write_text(content)
    out = tmp_path / "out"
    assert main(arguments(corpus, tokenizer, out, "eod_token=[END]")) == 0
    assert main(["inspect", str(out)]) == 0
    assert re.search(r"\|== document .*\n'.*\[END\]'", capsys.readouterr().out)
    adopt = ["adopt", str(out / "train-00000.bin"), "--kind", "megatron", "--tokenizer", str(tokenizer)]
    assert main([*adopt, "--out", str(tmp_path / "adopted"), "--eod-token", "[END]"]) == 0
    assert read_manifest(tmp_path / "adopted").eod_id == read_manifest(out).eod_id
    assert main(["inspect", str(tmp_path / "adopted")]) == 0
    assert re.search(r"\|== document .*\n'.*\[END\]'", capsys.readouterr().out)


def test_a_damaged_result_is_not_taken_for_finished(corpus, tiny_tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, out)) == 0
    (out / "train-00000.bin").write_bytes(b"")
    assert main(arguments(corpus, tiny_tokenizer, out)) == 2
    assert "train-00000.bin: index says" in capsys.readouterr().err
    assert main(arguments(corpus, tiny_tokenizer, out, "overwrite=true")) == 0


def test_an_input_that_changes_during_a_build_is_noticed(corpus, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_pipeline.build.shard.BATCH_DOCUMENTS", 10)
    add = PartWriter.add

    def add_and_append(writer, *documents):
        with corpus.open("a") as stream:
            stream.write('{"text": "one more"}\n')
        add(writer, *documents)

    monkeypatch.setattr(PartWriter, "add", add_and_append)
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out")) == 2
    assert "web.jsonl was changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_that_no_build_made_is_ever_deleted(corpus, tiny_tokenizer, tmp_path, capsys):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("years of work")
    assert main(arguments(corpus, tiny_tokenizer, out, "overwrite=true")) == 2
    assert "exists and is not a finished folder of shards" in capsys.readouterr().err
    assert (out / "chapter1.txt").read_text() == "years of work"


def test_the_current_folder_is_not_replaced(corpus, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", ".."):
        assert main(arguments(corpus, tiny_tokenizer, Path(out))) == 2
        assert "where this program runs" in capsys.readouterr().err


def test_an_empty_folder_may_become_the_result(corpus, tiny_tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out")) == 0
    assert verify(tmp_path / "out") == []


def test_two_builds_do_not_write_the_same_folder(corpus, tiny_tokenizer, tmp_path, capsys):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out")) == 2
    assert "another build is writing" in capsys.readouterr().err
    os.close(other)
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out")) == 0


def test_a_changed_data_set_is_built_again_and_never_taken_for_the_same(tiny_tokenizer, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    path, out = tmp_path / "set", tmp_path / "out"
    settings = [f"out={out}", f"tokenizer={tiny_tokenizer}", "sources.s.kind=dataset", f"sources.s.path={path}"]
    settings += ["heldout_fraction=0", "workers=1"]
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(path))
    assert main(["build", *settings]) == 0
    assert main(["build", *settings]) == 0
    assert "was built from these inputs and settings already" in capsys.readouterr().out
    datasets.Dataset.from_dict({"text": ["six", "ten"]}).save_to_disk(str(path))
    assert main(["build", *settings]) == 2
    assert "was made from other inputs" in capsys.readouterr().err
    assert main(["build", *settings, "overwrite=true"]) == 0
    tokenizer = open_tokenizer(out / "tokenizer")
    assert [tokenizer.decode(one[:-1]) for one in documents(out, "train")] == ["six", "ten"]
