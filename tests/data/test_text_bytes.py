"""Bits per byte: the bytes of held-out tokens are those of the documents that the corpus had, to the byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline.cli import main
from data_pipeline.tokenize.training import train_tokenizer
from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.heldout import heldout_losses
from ponder_scale.data.loader import heldout_batches, open_sources
from ponder_scale.data.text_bytes import UNKNOWN, text_bytes
from ponder_scale.errors import TokenizerError
from ponder_scale.shards.format import open_shards
from ponder_scale.shards.packing import pack
from tests.data_pipeline.builds import arguments, write_jsonl
from tests.tiny import TEXTS

LONG = 4096  # tokens, more than any document here
CORPUS = [f"{i}: {TEXTS[i % 3]}\n\n  {TEXTS[(i + 1) % 3]}\t🦊 é" for i in range(120)]
Make = Callable[[Path], None]


def bpe(folder: Path) -> None:
    train_tokenizer(CORPUS, 300, "bpe", folder)


def bpe_whose_end_is_an_ordinary_token(folder: Path) -> None:
    bpe(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for each in content["added_tokens"]:
        each["special"] = False
    file.write_text(json.dumps(content))


def pieces(folder: Path) -> None:
    train_tokenizer(CORPUS, 400, "sentencepiece", folder)


def pieces_with_a_space_before_each_text(folder: Path) -> None:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines() if line),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def unigram(folder: Path) -> None:
    """As T5 and its like, but that nothing of a text is changed."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    alphabet = sorted(set("".join(CORPUS)))
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", initial_alphabet=alphabet
    )
    made.train_from_iterator(CORPUS, trainer)
    _save(made, folder)


def llama(folder: Path) -> None:
    """As the published LLaMA: BPE with bytes to fall back to, and a space before each text."""
    alphabet = sorted(set("".join(TEXTS).replace(" ", "▁")) - set("数学"))
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *alphabet, "th", "he", "▁t", "▁▁"]
    merges = [("t", "h"), ("h", "e"), ("▁", "t"), ("▁", "▁")]
    made = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    _save(made, folder)


def _save(made: tokenizers.Tokenizer, folder: Path) -> None:
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))


KINDS: list[Make] = [
    bpe,
    bpe_whose_end_is_an_ordinary_token,
    pieces,
    pieces_with_a_space_before_each_text,
    unigram,
    llama,
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def built(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Shards of the corpus in which every document is held out or trained on, and the texts held out, in order."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder / "tokenizer")
    corpus = write_jsonl(folder / "texts.jsonl", CORPUS)
    out = folder / "shards"
    eod = [] if (folder / "tokenizer/tokenizer_config.json").exists() else ["eod_token=</s>"]
    build = arguments(corpus, folder / "tokenizer", out, "workers=1", *eod)
    assert main([word.replace("heldout_fraction=0.1", "heldout_fraction=0.4") for word in build]) == 0
    return out, held_out_texts(out)


def held_out_texts(folder: Path) -> list[str]:
    """The texts of the corpus whose tokens these are, found by decoding with the tokenizer's own library."""
    file = folder / "tokenizer/tokenizer.json"
    if file.is_file():
        library = tokenizers.Tokenizer.from_file(str(file))
        decode: Callable[[list[int]], str] = library.decode
    else:
        decode = sentencepiece.SentencePieceProcessor(model_file=str(file.with_name("tokenizer.model"))).decode
    (shard,) = open_shards(folder).split("heldout")
    ends = np.cumsum(shard.lengths)
    texts = [
        decode(shard.tokens[end - length : end - 1].tolist())
        for end, length in zip(ends.tolist(), shard.lengths.tolist(), strict=True)
    ]
    assert len(texts) > 30 and set(texts) <= set(CORPUS)
    return texts


class _Losses:
    """A model of one pass whose loss of a token is its id, in nats."""

    def __init__(self) -> None:
        self.total = 0.0
        self.labels: list[int] = []

    def __call__(self, tokens: Any, labels: Any, positions: Any) -> Any:
        counted = labels[labels >= 0].double()
        self.total += counted.sum().item()
        self.labels += counted.int().tolist()
        return type("Output", (), {"pass_losses": counted.mean().reshape(1) if len(counted) else torch.zeros(1)})


def test_bits_per_byte_is_all_bits_over_all_bytes_of_the_documents(built: tuple[Path, list[str]]) -> None:
    folder, texts = built
    sizes = [len(text.encode()) for text in texts]
    pack(open_shards(folder), LONG)
    data = DataConfig({"x": SourceConfig(str(folder))}, LONG, packing="best-fit")
    sources = open_sources(data)
    predict, table = _Losses(), text_bytes(sources.values())
    batches = list(heldout_batches(data, sources, sequences=10_000, micro_batch=1))
    found = heldout_losses(predict, batches, sizes=table)
    # whole documents; of the first in each bin the first token is never predicted, and its bytes are not said
    firsts = [int(batch.tokens[0, 0]) for batch in batches]
    first_bytes = 0
    for token in firsts:
        size = int(table.sizes[token]) - int(table.spaced[token])
        first_bytes += size
    assert found is not None and found.bytes == sum(sizes) - first_bytes
    assert found.bits_per_byte == pytest.approx([predict.total / math.log(2) / found.bytes])


def test_documents_that_are_cut_anywhere_have_the_bytes_of_their_tokens(built: tuple[Path, list[str]]) -> None:
    folder, texts = built
    data = DataConfig({"x": SourceConfig(str(folder))}, 7)
    sources = open_sources(data)
    (shard,) = sources["x"].split("heldout")
    table, predict = text_bytes(sources.values()), _Losses()
    found = heldout_losses(predict, heldout_batches(data, sources, sequences=10_000, micro_batch=3), sizes=table)
    tokens, begins = shard.tokens.tolist(), {0, *np.cumsum(shard.lengths).tolist()}
    size = 0
    for place in (0, *range((len(tokens) - 1) // 7 * 7 + 1, len(tokens))):  # the first, and what fills no sequence
        size += int(table.sizes[tokens[place]]) - (place in begins and bool(table.spaced[tokens[place]]))
    assert found is not None and found.bytes == sum(len(text.encode()) for text in texts) - size


def test_what_does_not_count_has_no_bytes(tmp_path: Path, tiny_tokenizer: Path) -> None:
    pairs = [{"prompt": f"{i}: Größe", "answer": text} for i, text in enumerate(TEXTS * 20)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    fields = ["sources.chat.kind=jsonl", "sources.chat.loss={prompt: prompt, completion: answer}"]
    out = tmp_path / "out"
    build = [*fields, f"sources.chat.path={file}", f"tokenizer={tiny_tokenizer}", f"out={out}", "workers=1"]
    assert main(["build", *build, "heldout_fraction=0.5"]) == 0
    pack(open_shards(out), LONG)
    data = DataConfig({"x": SourceConfig(str(out))}, LONG, packing="best-fit", document_mask=True)
    sources = open_sources(data)
    found = heldout_losses(
        _Losses(), heldout_batches(data, sources, sequences=100, micro_batch=1), sizes=text_bytes(sources.values())
    )
    library = tokenizers.Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    (shard,) = sources["x"].split("heldout")
    assert shard.mask is not None
    counted = shard.tokens[shard.mask.read(0, shard.info.tokens)].tolist()
    assert found is not None and found.tokens == len(counted)
    answers = library.decode(counted, skip_special_tokens=False).split("<|endoftext|>")[:-1]
    assert set(answers) == set(TEXTS) and len(answers) == shard.info.documents
    assert found.bytes == sum(len(answer.encode()) for answer in answers)


def test_a_special_token_has_no_bytes_an_added_one_its_own_and_an_unknown_one_is_not_known(
    tiny_shards: Any, tmp_path: Path
) -> None:
    made = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("▁é", -2.0)], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<|end|>"])
    made.add_tokens(["größer", tokenizers.AddedToken("taker", lstrip=True)])
    _save(made, tmp_path / "tokenizer")
    shards = tiny_shards(vocab_size=8)
    table = text_bytes([shards], tmp_path / "tokenizer")
    assert table.sizes.tolist() == [UNKNOWN, 1, 3, 0, 8, UNKNOWN, UNKNOWN, UNKNOWN]  # 0 ends documents here, too
    labels = torch.tensor([[1, 2, 2, 4, -100, 5]])
    before = torch.tensor([[0, 0, 1, 2, 4, 4]])
    assert table.of(before, labels) == (1 + 2 + 3 + 8, 1)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")), "a WordLevel model with no decoder"),
        (lambda: tokenizers.Tokenizer(models.BPE({"a": 0}, [])), "a BPE model with no decoder"),
        (lambda: with_decoder(decoders.WordPiece()), "a BPE model with WordPiece"),
        (None, "cannot be read as a tokenizer"),
        ("nothing", r"no tokenizer\.json or SentencePiece \.model in it"),
        ("llama3", "cannot be read as a SentencePiece model"),
    ],
)
def test_bytes_that_are_not_known_are_refused_in_one_line(
    made: Any, reason: str, tiny_shards: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    if callable(made):
        _save(made(), folder)
    else:
        folder.mkdir()
        if made is None:
            (folder / "tokenizer.json").write_text("{}")
        elif made == "llama3":
            (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(TokenizerError, match=reason) as refused:
        text_bytes([tiny_shards()], folder)
    assert "\n" not in str(refused.value)


def with_decoder(decoder: Any) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    made.decoder = decoder
    return made


def test_a_space_before_each_text_needs_a_token_that_marks_its_begin(tiny_tokenizer: Path, tmp_path: Path) -> None:
    from ponder_scale.shards.format import ShardSet
    from ponder_scale.shards.manifest import Manifest

    shards = ShardSet(tmp_path, Manifest("uint16", 300, None, None, "a" * 64, {}), {})
    llama(tmp_path / "llama")
    made = json.loads((tmp_path / "llama/tokenizer.json").read_text())
    made["added_tokens"] = []
    (tmp_path / "llama/tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(TokenizerError, match="the shards do not mark where a text begins"):
        text_bytes([shards], tmp_path / "llama")
    assert text_bytes([shards], tiny_tokenizer).sizes.min() == 0
