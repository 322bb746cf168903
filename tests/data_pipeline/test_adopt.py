"""Token files of other programs, written here by their formats, used where they lie; ours in Megatron's reader."""

import struct

import numpy as np
import pytest
import torch

from data_pipeline.cli import main
from data_pipeline.tokenizer import open_tokenizer
from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.manifest import read_manifest, verify
from ponder_scale.shards import open_shards

from .test_build import arguments, make_texts, write_jsonl


def write_megatron(prefix, documents, dtype="<u2", code=8):
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(one, dtype).tobytes() for one in documents))
    lengths = [len(one) for one in documents]
    pointers = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    ends = struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    prefix.with_suffix(".idx").write_bytes(head + body + ends)
    return prefix.with_suffix(".bin")


@pytest.fixture
def documents(tiny_tokenizer):
    tokenizer = open_tokenizer(tiny_tokenizer)
    found = []
    for text in make_texts(60):
        tokens, _ = tokenizer.encode_batch([text])
        found.append([*tokens.tolist(), tokenizer.eod_id])
    return found


def adopt(files, kind, tokenizer, out, *more) -> int:
    names = [str(path) for path in files]
    return main(["adopt", *names, "--kind", kind, "--tokenizer", str(tokenizer), "--out", str(out), *more])


def flat(documents) -> list[int]:
    return [token for one in documents for token in one]


@pytest.mark.filterwarnings("ignore")
def test_ours_opens_in_the_reader_of_megatron_and_theirs_is_adopted_back(tiny_tokenizer, tmp_path, documents):
    from megatron.core.datasets import indexed_dataset  # slow to load

    corpus = write_jsonl(tmp_path / "web.jsonl", make_texts(60))
    ours = tmp_path / "ours"
    assert main(arguments(corpus, tiny_tokenizer, ours, "heldout_fraction=0")) == 0
    reader = indexed_dataset.IndexedDataset(str(ours / "train-00000"))
    assert [reader[i].tolist() for i in range(len(reader))] == documents
    assert reader.document_indices.tolist() == list(range(61))
    theirs = tmp_path / "theirs.bin"
    builder = indexed_dataset.IndexedDatasetBuilder(str(theirs), dtype=np.uint16)
    for one in documents:
        builder.add_document(torch.tensor(one), [len(one)])
    builder.finalize(str(theirs.with_suffix(".idx")))
    assert theirs.read_bytes() == (ours / "train-00000.bin").read_bytes()
    assert theirs.with_suffix(".idx").read_bytes() == (ours / "train-00000.idx").read_bytes()
    assert adopt([theirs], "megatron", tiny_tokenizer, tmp_path / "adopted") == 0
    adopted = open_shards(tmp_path / "adopted")
    assert adopted.split("train")[0].tokens.tolist() == flat(documents)
    assert adopted.manifest.identity == read_manifest(ours).identity
    assert adopted.manifest.eod_id == open_tokenizer(tiny_tokenizer).eod_id
    assert verify(tmp_path / "adopted") == []


def test_megatron_files_of_int32_are_adopted(tiny_tokenizer, tmp_path, documents):
    path = write_megatron(tmp_path / "wide", documents, "<i4", 4)
    assert adopt([path], "megatron", tiny_tokenizer, tmp_path / "out") == 0
    assert open_shards(tmp_path / "out").split("train")[0].tokens.tolist() == flat(documents)
    assert read_manifest(tmp_path / "out").dtype == "int32"


@pytest.mark.parametrize(("dtype", "name"), [("<u2", "uint16"), ("<u4", "uint32")])
def test_datatrove_files_are_adopted_with_their_boundaries(tiny_tokenizer, tmp_path, documents, dtype, name):
    path = tmp_path / "00000_tokens.ds"
    path.write_bytes(np.array(flat(documents), dtype).tobytes())
    np.cumsum([len(one) for one in documents]).astype("<u8").tofile(tmp_path / "00000_tokens.ds.index")
    assert adopt([path], "datatrove", tiny_tokenizer, tmp_path / "out", "--dtype", name) == 0
    (shard,) = open_shards(tmp_path / "out").split("train")
    assert shard.tokens.tolist() == flat(documents)
    assert shard.lengths.tolist() == [len(one) for one in documents]
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(("dtype", "name"), [("<u2", "uint16"), ("<u4", "uint32")])
def test_headerless_dumps_are_adopted_held_out_files_included_and_train(
    tiny_tokenizer, tmp_path, documents, dtype, name
):
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.bin")
        files[-1].write_bytes(np.array(flat(documents), dtype).tobytes())
    before = [path.read_bytes() for path in files]
    out = tmp_path / "out"
    assert adopt(files, "raw", tiny_tokenizer, out, "--dtype", name, "--heldout-files", "1") == 0
    shards = open_shards(out)
    assert [len(shards.split(split)) for split in ("train", "heldout")] == [2, 1]
    data = DataConfig(sources={"x": SourceConfig(path=str(out))}, seq_len=32)
    loader = Loader(data, open_sources(data), seed=0, global_batch=4, micro_batch=4)
    assert loader.next_batches()[0].tokens.shape == (4, 33)
    loader.close()
    assert [path.read_bytes() for path in files] == before
    files[0].write_bytes(before[0][:-4] + b"\1\0\0\0")
    assert verify(out)[0].startswith("train-00000.bin: block 0")


def test_a_headerless_dump_has_any_name_and_no_header(tiny_tokenizer, tmp_path, documents, capsys):
    """dolma's are headerless and end in .npy; what numpy.save wrote is no dump."""
    path = tmp_path / "part-0-00000.npy"
    np.array(flat(documents), "<u2").tofile(path)
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "out") == 0
    assert open_shards(tmp_path / "out").split("train")[0].tokens.tolist() == flat(documents)
    np.save(path, np.array(flat(documents), "<u2"))
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "other") == 2
    assert "begins with the header of numpy.save" in capsys.readouterr().err


def damaged(tmp_path, documents, what):
    path = write_megatron(tmp_path / "bad", documents)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-2])
    if what == "no index":
        path.with_suffix(".idx").unlink()
    if what == "gap":
        content = bytearray(path.with_suffix(".idx").read_bytes())
        content[34 + 4 * len(documents) + 8] ^= 1
        path.with_suffix(".idx").write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "its index says"),
        ("no index", "no bad.idx beside it"),
        ("gap", "its sequences do not follow one another"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tiny_tokenizer, tmp_path, documents, capsys, what, message):
    assert adopt([damaged(tmp_path, documents, what)], "megatron", tiny_tokenizer, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_tokenizer_or_type_are_refused(tiny_tokenizer, tmp_path, documents, capsys):
    """dolma's --dtype mistakes give garbage; Megatron's fast reader takes int32 for uint16 at some vocabularies."""
    path = write_megatron(tmp_path / "other", [[1, 2, 299], [5, 300]])
    assert adopt([path], "megatron", tiny_tokenizer, tmp_path / "out") == 2
    assert "token 4 is 300; " in capsys.readouterr().err
    raw = tmp_path / "raw.bin"
    raw.write_bytes(np.array(flat(documents), "<u2").tobytes())
    assert adopt([raw], "raw", tiny_tokenizer, tmp_path / "out", "--dtype", "uint32") == 2
    error = capsys.readouterr().err
    assert "give the tokenizer and the dtype" in error or "is no multiple of 4" in error
    wide = tmp_path / "x.ds"
    wide.write_bytes(raw.read_bytes())
    np.array([7], "<u8").tofile(tmp_path / "x.ds.index")
    assert adopt([wide], "datatrove", tiny_tokenizer, tmp_path / "out") == 2
    assert "its last document ends at 7" in capsys.readouterr().err


def test_an_output_that_is_not_empty_and_an_odd_name_are_refused(tiny_tokenizer, tmp_path, documents, capsys):
    path = write_megatron(tmp_path / "good", documents)
    assert adopt([path], "megatron", tiny_tokenizer, tmp_path) == 2
    assert "which is not empty" in capsys.readouterr().err
    assert adopt([path], "datatrove", tiny_tokenizer, tmp_path / "out") == 2
    assert "expected a file that ends in .ds" in capsys.readouterr().err
    assert adopt([path], "megatron", tiny_tokenizer, tmp_path / "out", "--heldout-files", "1") == 2
    assert "--heldout-files is 1, of 1 files" in capsys.readouterr().err


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_535, 65_536, 65_537])
def test_the_type_of_the_tokens_follows_the_vocabulary_where_megatrons_reader_and_writer_disagree(vocab_size):
    from ponder_scale.shards import dtype_for

    assert dtype_for(vocab_size).name == ("uint16" if vocab_size < 65_500 else "int32")
