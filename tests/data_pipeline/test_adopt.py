"""Token files of other programs, written here by their formats, used where they lie; ours in Megatron's reader."""

import gzip
import re
import struct

import numpy as np
import pytest
import torch

from data_pipeline.cli import main
from data_pipeline.tokenize.tokenizer import open_tokenizer
from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.shards.format import open_shards
from ponder_scale.shards.manifest import read_manifest, verify
from tests.data_pipeline.builds import adopt, arguments, make_texts, write_jsonl


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
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "out", "--dtype", "uint16") == 0
    assert open_shards(tmp_path / "out").split("train")[0].tokens.tolist() == flat(documents)
    np.save(path, np.array(flat(documents), "<u2"))
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "other", "--dtype", "uint16") == 2
    assert "begins with the header of numpy.save" in capsys.readouterr().err
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(flat(documents))
    path.write_bytes(header.tobytes() + np.array(flat(documents), "<u2").tobytes())
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "other", "--dtype", "uint16") == 2
    assert "begins with the header of llm.c, of 1,024 bytes" in capsys.readouterr().err
    path.rename(path.with_suffix(".gz"))
    assert adopt([path.with_suffix(".gz")], "raw", tiny_tokenizer, tmp_path / "other", "--dtype", "uint16") == 2
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory):
    """Of 70,001 tokens."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("large")
    words = ["</s>", *(f"w{i}" for i in range(1, 70_001))]
    Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)})).save(str(folder / "tokenizer.json"))
    return folder


def write(path, tokens, dtype):
    path.write_bytes(np.array(tokens, dtype).tobytes())
    return path


def test_the_width_of_headerless_tokens_has_to_be_given(tiny_tokenizer, tmp_path, documents, capsys):
    path = write(tmp_path / "x.bin", flat(documents), "<u2")
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "out") == 2
    assert "give --dtype uint16 or --dtype uint32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_uint16_is_refused_for_more_tokens_than_it_holds(large_tokenizer, tmp_path, capsys):
    """As uint16, the dump of five would be ten tokens, all of them in the vocabulary."""
    path = write(tmp_path / "x.bin", [69999, 5, 70000, 66000, 70000], "<u4")
    assert adopt([path], "raw", large_tokenizer, tmp_path / "out", "--dtype", "uint16") == 2
    error = capsys.readouterr().err
    assert "has 70,001 tokens, and uint16 holds ids below 65,536; give --dtype uint32" in error
    assert adopt([path], "raw", large_tokenizer, tmp_path / "out", "--dtype", "uint32") == 0
    assert open_shards(tmp_path / "out").split("train")[0].tokens.tolist() == [69999, 5, 70000, 66000, 70000]
    assert "it contains no end token (0), so it becomes one document" in capsys.readouterr().err
    narrow = write_megatron(tmp_path / "narrow", [[1, 2], [3]])
    assert adopt([narrow], "megatron", large_tokenizer, tmp_path / "other") == 2
    assert "uint16 holds ids below 65,536" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("made", "read", "message"),
    [
        ("<u4", "uint16", "halves of uint32 tokens; give the tokenizer and the dtype .* fit --dtype uint32"),
        ("<i4", "uint16", "halves of uint32 tokens; give the tokenizer and the dtype .* fit --dtype uint32"),
        ("<u2", "uint32", "expected|give the tokenizer and the dtype .* its first tokens fit --dtype uint16"),
        ("<i8", "uint16", "halves of uint32 tokens"),
        ("<i8", "uint32", "halves of 64-bit tokens"),
        (">u2", "uint16", "its bytes seem to be big-endian"),
        (">u4", "uint32", "its bytes seem to be big-endian"),
        (">u4", "uint16", "give the tokenizer and the dtype"),
        ("<f4", "uint32", "give the tokenizer and the dtype"),
        ("u1", "uint16", "give the tokenizer and the dtype"),
    ],
)
@pytest.mark.parametrize("count", [4, 4000])
def test_a_dump_of_another_width_or_byte_order_is_refused(tiny_tokenizer, tmp_path, capsys, made, read, message, count):
    tokens = np.random.default_rng(0).integers(1, 250 if made == "u1" else 300, count)
    tokens[-1] = 0
    path = write(tmp_path / "x.bin", tokens, made)
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "out", "--dtype", read) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_big_endian_tokens_that_are_all_in_the_vocabulary_are_refused(tmp_path, capsys):
    """With 65,536 tokens, every two bytes are a token in both orders."""
    from tokenizers import Tokenizer, models

    words = {("</s>" if i == 0 else f"w{i}"): i for i in range(2**16)}
    Tokenizer(models.WordLevel(words)).save(str(tmp_path / "tokenizer.json"))
    generator = np.random.default_rng(0)
    frequencies = 1 / (np.arange(2**16) + 2.7)  # Zipf's and Mandelbrot's law; trainers give frequent tokens low ids
    tokens = generator.choice(2**16, 20_000, p=frequencies / frequencies.sum())
    path = write(tmp_path / "x.bin", tokens, ">u2")
    assert adopt([path], "raw", tmp_path / "tokenizer.json", tmp_path / "out", "--dtype", "uint16") == 2
    assert "its tokens look big-endian" in capsys.readouterr().err
    for name, right in (("natural", tokens), ("uniform", generator.integers(0, 65_536, 20_000))):
        path = write(tmp_path / f"{name}.bin", right, "<u2")
        assert adopt([path], "raw", tmp_path / "tokenizer.json", tmp_path / name, "--dtype", "uint16") == 0


def lengths_of(folder) -> list[int]:
    return [length for shard in open_shards(folder).split("train") for length in shard.lengths.tolist()]


@pytest.mark.parametrize(("dtype", "name"), [("<u2", "uint16"), ("<u4", "uint32")])
def test_the_documents_of_a_headerless_dump_end_at_the_end_token(
    tiny_tokenizer, tmp_path, documents, dtype, name, monkeypatch
):
    monkeypatch.setattr("data_pipeline.commands.dumps._BLOCK", 64)
    five, eod = documents[:5], open_tokenizer(tiny_tokenizer).eod_id
    out = tmp_path / "ended"
    path = write(tmp_path / "ended.bin", flat(five), dtype)
    assert adopt([path], "raw", tiny_tokenizer, out, "--dtype", name) == 0
    assert lengths_of(out) == [len(one) for one in five]
    assert (read_manifest(out).eod_id, read_manifest(out).bos_id) == (eod, None)
    out = tmp_path / "cut"  # as where a corpus goes on in the next file
    path = write(tmp_path / "cut.bin", flat(five)[:-2], dtype)
    assert adopt([path], "raw", tiny_tokenizer, out, "--dtype", name) == 0
    assert lengths_of(out) == [len(one) for one in five[:4]] + [len(five[4]) - 2]
    assert read_manifest(out).eod_id == eod
    out = tmp_path / "begun"  # as llm.c writes them
    path = write(tmp_path / "begun.bin", flat([[eod, *one[:-1]] for one in five]), dtype)
    assert adopt([path], "raw", tiny_tokenizer, out, "--dtype", name) == 0
    assert lengths_of(out) == [len(one) for one in five]
    assert (read_manifest(out).eod_id, read_manifest(out).bos_id) == (None, eod)


def test_the_end_token_of_a_headerless_dump_can_be_named(tiny_tokenizer, tmp_path, documents, capsys):
    path = write(tmp_path / "x.bin", [5, 6, 7, 5, 7], "<u2")
    name = open_tokenizer(tiny_tokenizer).decode([7])
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "out", "--dtype", "uint16", "--eod-token", name) == 0
    assert lengths_of(tmp_path / "out") == [3, 2]
    assert "2 documents, 5 tokens" in capsys.readouterr().out


def test_dolmas_own_boundaries_are_the_documents(tiny_tokenizer, tmp_path, documents, capsys):
    """dolma 1.2.1, tokenizer/data_types.py, MemmapMetadata: start, end, id, src, loc; an end token is no boundary."""
    some = [[5, 6, 0], [7, 0, 8], [9], [4, 4]]
    path = write(tmp_path / "part-0-00000.npy", flat(some), "<u2")
    ends = np.cumsum([len(one) for one in some])
    rows = [
        f"{end - len(one)},{end},id {i},/data/a.json.gz,{i}\r\n"
        for i, (one, end) in enumerate(zip(some, ends, strict=True))
    ]
    boundaries = tmp_path / "part-0-00000.csv.gz"
    boundaries.write_bytes(gzip.compress("".join(rows).encode()))
    assert adopt([path], "raw", tiny_tokenizer, tmp_path / "out", "--dtype", "uint16") == 0
    assert lengths_of(tmp_path / "out") == [3, 3, 1, 2]
    for number, content in enumerate(
        [
            gzip.compress("".join(rows[:-1]).encode()),
            gzip.compress("".join([rows[0], *rows[2:]]).encode()),
            gzip.compress(b"a,b\r\n"),
            gzip.compress(b""),
            gzip.compress("".join(rows).encode())[:-9],
            b"no gzip",
        ]
    ):
        boundaries.write_bytes(content)
        assert adopt([path], "raw", tiny_tokenizer, tmp_path / f"bad{number}", "--dtype", "uint16") == 2
        error = capsys.readouterr().err
        assert "part-0-00000.csv.gz: " in error and "move it away to split documents at the end token" in error
        assert not (tmp_path / f"bad{number}").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_megatron_document_of_several_sequences_is_one_document(tiny_tokenizer, tmp_path, capsys):
    from megatron.core.datasets import indexed_dataset

    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    for one, lengths in (([5, 6, 7, 8, 0], [3, 2]), ([9, 0], [2]), ([4, 4, 4, 0], [1, 1, 2])):
        builder.add_document(torch.tensor(one), lengths)
    builder.finalize(str(tmp_path / "x.idx"))
    out = tmp_path / "out"
    assert adopt([tmp_path / "x.bin"], "megatron", tiny_tokenizer, out) == 0
    assert "3 documents, 11 tokens" in capsys.readouterr().out
    assert lengths_of(out) == [5, 2, 4]
    assert verify(out) == []
    reader = indexed_dataset.IndexedDataset(str(out / "train-00000"))
    assert [reader[i].tolist() for i in range(len(reader))] == [[5, 6, 7, 8, 0], [9, 0], [4, 4, 4, 0]]
    content = bytearray((tmp_path / "x.idx").read_bytes())
    struct.pack_into("<q", content, len(content) - 8, 5)  # of six sequences
    (tmp_path / "x.idx").write_bytes(content)
    assert adopt([tmp_path / "x.bin"], "megatron", tiny_tokenizer, tmp_path / "other") == 2
    assert "its documents do not cover its 6 sequences" in capsys.readouterr().err


def test_the_index_of_datatrove_says_how_wide_its_tokens_are(tiny_tokenizer, tmp_path, documents, capsys):
    path = write(tmp_path / "x.ds", flat(documents), "<u4")
    np.cumsum([len(one) for one in documents]).astype("<u8").tofile(tmp_path / "x.ds.index")
    assert adopt([path], "datatrove", tiny_tokenizer, tmp_path / "out") == 0
    assert open_shards(tmp_path / "out").split("train")[0].tokens.tolist() == flat(documents)
    assert adopt([path], "datatrove", tiny_tokenizer, tmp_path / "other", "--dtype", "uint16") == 2
    assert "check --dtype" in capsys.readouterr().err
    narrow = write_megatron(tmp_path / "narrow", documents)
    assert adopt([narrow], "megatron", tiny_tokenizer, tmp_path / "other", "--dtype", "uint32") == 2
    assert "--dtype is uint32; " in capsys.readouterr().err


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
        ("no index", "bad.idx is missing beside it"),
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
    assert "give the tokenizer and the dtype" in error or "is not a multiple of the 4 bytes" in error
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
    from ponder_scale.shards.format import dtype_for

    assert dtype_for(vocab_size).name == ("uint16" if vocab_size < 65_500 else "int32")
