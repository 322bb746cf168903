import random
import sys

import numpy as np
import pytest

from data_pipeline.cli import main
from data_pipeline.tokenize import backends
from data_pipeline.tokenize.backends import PROBES, Checked, Mismatch, checked, choose, first_difference, open_engine
from data_pipeline.tokenize.tokenizer import open_tokenizer
from data_pipeline.tokenize.training import train_tokenizer
from ponder_scale.errors import TokenizerError
from ponder_scale.shards.manifest import read_manifest
from tests.data_pipeline.builds import arguments, documents, make_texts, write_jsonl
from tests.data_pipeline.tokenizers import bare

SPELLED = ["</s>", "a<s>b", "<unk> <|endoftext|>", "x <|endoftext|>y </s>", "<pad>", "a <|never|>b"]


@pytest.fixture(autouse=True)
def nothing_opened():
    """Tests replace engines, which a process opens once."""
    backends._opened.clear()
    yield
    backends._opened.clear()


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "sentencepiece"
    train_tokenizer([f"{text} {i}" for i, text in enumerate(make_texts(400))], 340, "sentencepiece", folder)
    return folder


def fuzz(count: int) -> list[str]:
    """Texts of random characters of many kinds, and of special tokens."""
    generator = random.Random(0)
    kinds = ["ab ", "  \n\t", "019.,-", "éßü", "数学", "\U0001f600\u200d", "\x00\x7f", *SPELLED]
    return [
        "".join(generator.choice(generator.choice(kinds)) for _ in range(generator.randint(0, 60)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("engine", ["gigatoken", "tiktoken"])
def test_an_engine_gives_the_tokens_of_the_reference(tiny_tokenizer, engine):
    reference = open_tokenizer(tiny_tokenizer)
    texts = [*PROBES, *SPELLED, *make_texts(300), *fuzz(2000)]
    assert first_difference(open_engine(engine, reference), reference, texts) is None
    assert choose(engine, reference, [], pytest.fail) == engine
    assert choose("auto", reference, [], pytest.fail) == "gigatoken"


def test_gigatoken_gives_the_tokens_of_sentencepiece_special_spellings_included(sentencepiece):
    reference = open_tokenizer(sentencepiece)
    assert reference.special == ["<unk>", "<s>", "</s>"]
    texts = [*PROBES, *make_texts(300), *SPELLED, *SPELLED, "plain", *fuzz(2000)]
    assert first_difference(open_engine("gigatoken", reference), reference, texts) is None
    assert choose("auto", reference, SPELLED, pytest.fail) == "gigatoken"


def test_an_engine_without_the_tokenizer_falls_back_loudly(sentencepiece, capsys):
    warnings: list[str] = []
    assert choose("tiktoken", open_tokenizer(sentencepiece), [], warnings.append) == "reference"
    (warning,) = warnings
    assert "backend tiktoken cannot read" in warning and "using its own library" in warning


def test_an_engine_that_gives_other_tokens_is_refused_loudly(tiny_tokenizer, monkeypatch):
    reference = open_tokenizer(tiny_tokenizer)

    def wrong(tokenizer):
        def encode(texts):
            tokens, lengths = tokenizer.encode_batch(texts)
            return np.where(tokens == tokens.max(), 0, tokens), lengths

        return encode

    monkeypatch.setattr(backends, "_gigatoken", wrong)
    warnings: list[str] = []
    assert choose("auto", reference, ["some text"], warnings.append) == "tiktoken"
    assert "backend gigatoken gives other tokens" in warnings[0]


def drift(monkeypatch, after: int) -> None:
    """gigatoken becomes wrong for texts that hold the number `after`; the checks at the start do not see it."""
    right = backends._gigatoken

    def broken(reference):
        encode = right(reference)

        def wrong(texts):
            tokens, lengths = encode(texts)
            return (tokens + 1 if any(f"{after}:" in text for text in texts) else tokens), lengths

        return wrong

    monkeypatch.setattr(backends, "_gigatoken", broken)


def test_a_difference_during_a_build_does_the_unit_again_by_the_reference(
    tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    corpus = write_jsonl(tmp_path / "web.jsonl", make_texts(600))
    same = ["shard_bytes=20000", "workers=1"]
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "reference", *same, "backend=reference")) == 0
    monkeypatch.setattr("data_pipeline.tokenize.backends.SAMPLE_EVERY", 3)
    drift(monkeypatch, 333)
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "fast", *same)) == 0
    assert "the reference processes the unit again" in capsys.readouterr().err
    engines = read_manifest(tmp_path / "fast").provenance["engines"]
    assert engines["reference"] == 1 and engines["gigatoken"] >= 2
    assert read_manifest(tmp_path / "fast").identity == read_manifest(tmp_path / "reference").identity


def test_an_engine_that_fails_during_a_build_is_replaced_by_the_reference(
    tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    """tiktoken gives up on a million spaces and a letter; or a build goes on where the engine is not installed."""
    corpus = write_jsonl(tmp_path / "web.jsonl", [*make_texts(40), " " * 1_000_000 + "x"])
    same = ["workers=1", "shard_bytes=2000", "max_document_bytes=2000000"]
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "reference", *same, "backend=reference")) == 0
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "fast", *same, "backend=tiktoken")) == 0
    assert "tiktoken failed (ValueError: " in (said := capsys.readouterr().err)
    assert "the reference processes the unit again" in said
    engines = read_manifest(tmp_path / "fast").provenance["engines"]
    assert engines["reference"] == 1 and engines["tiktoken"] >= 1
    assert read_manifest(tmp_path / "fast").identity == read_manifest(tmp_path / "reference").identity
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setattr(backends, "_opened", {})
    with pytest.raises(Mismatch, match=r"cannot be opened \(import of tiktoken halted"):
        checked("tiktoken", open_tokenizer(tiny_tokenizer))


@pytest.mark.parametrize("failure", [ValueError("too long"), type("PanicException", (BaseException,), {})("too long")])
def test_whatever_ends_an_engine_is_its_failure_but_an_interruption(tiny_tokenizer, monkeypatch, failure):
    reference = open_tokenizer(tiny_tokenizer)

    def fail(texts):
        raise failure

    with pytest.raises(Mismatch, match=r"failed \(.*: too long\)"):
        Checked(fail, reference).encode_batch(["text"])
    assert first_difference(fail, reference, ["text"]) == f"{type(failure).__name__}: too long"
    monkeypatch.setattr(backends, "_gigatoken", fail)
    warnings: list[str] = []
    assert choose("gigatoken", reference, [], warnings.append) == "reference"
    assert "cannot read" in warnings[0] and "(too long)" in warnings[0]
    with pytest.raises(Mismatch, match=r"cannot be opened \(too long\)"):
        checked("gigatoken", reference)
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        Checked(fail, reference).encode_batch(["text"])


def test_the_check_before_a_build_is_of_little_text_of_the_corpus(tiny_tokenizer, tmp_path, monkeypatch):
    """The reference is slow: what it is asked for is most of the time a build takes to start."""
    corpus = write_jsonl(tmp_path / "web.jsonl", ["word " * 8000] * 30 + ["short"])
    asked = []
    monkeypatch.setattr("data_pipeline.build.begin.choose", lambda *values: asked.extend(values[2]) or "reference")
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "out", "workers=1")) == 0
    assert asked == ["word " * 8000, "short"]


def test_the_sample_is_taken_whatever_the_batches(tiny_tokenizer):
    reference = open_tokenizer(tiny_tokenizer)
    asked = []

    class Counting:
        def encode_batch(self, texts):
            asked.extend(texts)
            return reference.encode_batch(texts)

    texts = [f"text {i}" for i in range(5000)]
    for size in (1, 999, 5000):
        asked.clear()
        sampled = Checked(reference.encode_batch, Counting())
        for begin in range(0, 5000, size):
            sampled.encode_batch(texts[begin : begin + size])
        assert asked == ["text 0", "text 2048", "text 4096"]
    with pytest.raises(Mismatch, match=r"gives other tokens than tokenizer\.json for 'text 0'"):
        Checked(lambda texts: (np.zeros(len(texts), np.int32), np.ones(len(texts), np.int64)), reference).encode_batch(
            texts
        )


@pytest.mark.parametrize("backend", ["reference", "tiktoken", "gigatoken"])
def test_special_tokens_spelled_out_in_a_text_are_text_unless_asked(tiny_tokenizer, tmp_path, backend):
    """In Hugging Face's usual path </s> inside a text becomes the end of the document."""
    corpus = write_jsonl(tmp_path / "web.jsonl", SPELLED)
    settings = arguments(corpus, tiny_tokenizer, tmp_path / "text", f"backend={backend}", "append_eod=false")
    assert main(settings) == 0
    eod = open_tokenizer(tiny_tokenizer).eod_id
    found = [token for split in ("train", "heldout") for one in documents(tmp_path / "text", split) for token in one]
    assert eod not in found
    settings[1] = f"out={tmp_path / 'tokens'}"
    assert main([*settings, "special_tokens_in_text=tokens"]) == 0
    found = [token for split in ("train", "heldout") for one in documents(tmp_path / "tokens", split) for token in one]
    assert found.count(eod) == 2


def test_sentencepiece_never_reads_special_tokens_in_a_text(sentencepiece):
    with pytest.raises(TokenizerError, match="special_tokens_in_text is tokens; SentencePiece models"):
        open_tokenizer(sentencepiece, special_in_text=True)


def test_documents_begin_with_a_token_only_when_asked(tmp_path, tiny_tokenizer, sentencepiece, capsys):
    """Megatron's slow and fast scripts differ by a BOS token in each document."""
    corpus = write_jsonl(tmp_path / "web.jsonl", make_texts(50))
    for name, tokenizer, bos in (("bpe", tiny_tokenizer, "<|endoftext|>"), ("pieces", sentencepiece, "<s>")):
        for backend in ("reference", "gigatoken"):
            out = tmp_path / f"{name}-{backend}"
            assert main(arguments(corpus, tokenizer, out, f"backend={backend}", f"bos_token={bos}")) == 0
            manifest = read_manifest(out)
            assert all(one[0] == manifest.bos_id and one[-1] == manifest.eod_id for one in documents(out, "train"))
        assert read_manifest(tmp_path / f"{name}-reference").identity == read_manifest(out).identity
        assert main(arguments(corpus, tokenizer, tmp_path / f"{name}-plain")) == 0
        assert read_manifest(tmp_path / f"{name}-plain").bos_id is None
    assert main(arguments(corpus, tiny_tokenizer, tmp_path / "x", "bos_token=<none>")) == 2
    assert "bos_token is '<none>', which is not in its vocabulary" in capsys.readouterr().err


def test_a_converted_sentencepiece_model_is_checked_and_not_trusted(sentencepiece):
    """LlamaTokenizerFast made of a .model with legacy=False differed in every document."""
    reference = open_tokenizer(sentencepiece)
    assert first_difference(open_engine("gigatoken", reference), reference, [" leading", "x  y", "\n", "▁"]) is None


def test_a_tokenizer_that_tiktoken_cannot_do_is_left_to_the_reference(tmp_path):
    reference = open_tokenizer(bare(tmp_path / "bare", ["a", "b", "</s>"]))
    with pytest.raises(ValueError):
        open_engine("tiktoken", reference)
    warnings: list[str] = []
    choose("tiktoken", reference, [], warnings.append)
    assert len(warnings) == 1
