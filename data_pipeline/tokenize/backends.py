"""Faster engines for a tokenizer: accepted only while they give the tokens of the tokenizer's own library.

tiktoken and gigatoken are compared with the reference before a build on hard texts and on documents of the
corpus, and during it on a sample of every unit. A unit in which they differ is done again by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import orjson

from data_pipeline.tokenize.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizersTokenizer
from ponder_scale.errors import ConfigError

REFERENCE = "reference"
FASTEST_FIRST = ("gigatoken", "tiktoken")
SAMPLE_CHARACTERS = 2**16  # longer documents are not sampled: the reference takes much memory for them
SAMPLE_EVERY = 2048  # documents; costs the fastest engine about two percent
PROBES = (
    "",
    " ",
    "   leading and   inner   spaces ",
    "\n\n \n\t\ttabs\r\nand\rreturns \n",
    "don't DON'T we'll I'VE it\u2019s 12345 1234567 3.14e-10",
    "Größe naïveté İstanbul ǆ ﬁ e\u0301 \u1e9b\u0323",
    "数学 ひらがな 한국어 العربية עברית हिन्दी ไทย",
    "\U0001f600\U0001f1e9\U0001f1ea \U0001f469\u200d\U0001f4bb \ufeff\u200b\u00a0\u2028\u3000",
    "\x00\x01\x7f\x80\ufffd\uffff",
    "a" * 3000,
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # !?\n" * 20,
    "=" * 300 + "-" * 257 + " " * 129 + "\n" * 65,
)

_ENDINGS = (KeyboardInterrupt, SystemExit)  # all else that ends an engine is its failure, a panic of Rust too

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]

_opened: dict[tuple[Any, ...], Encode] = {}  # loading one costs more than a small build


class Mismatch(Exception):
    """An engine failed, or gave other tokens than the reference; the message goes on after its name."""


class Checked:
    """An engine, compared with the reference on each SAMPLE_EVERY-th document, beginning with the first."""

    def __init__(self, encode: Encode, reference: Tokenizer) -> None:
        self._encode, self._reference = encode, reference
        self._seen = 0

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokenizer.encode_batch`. Raises Mismatch where it fails, and for a sampled document with other tokens."""
        try:
            tokens, lengths = self._encode(texts)
        except _ENDINGS:
            raise
        except BaseException as error:
            raise Mismatch(f"failed ({type(error).__name__}: {_line(error)})") from error
        for number in range(-self._seen % SAMPLE_EVERY, len(texts), SAMPLE_EVERY):
            if len(texts[number]) > SAMPLE_CHARACTERS:
                continue
            end = int(lengths[: number + 1].sum())
            expected, _ = self._reference.encode_batch([texts[number]])
            if not np.array_equal(tokens[end - lengths[number] : end], expected):
                raise Mismatch(f"gives other tokens than {self._reference.path.name} for {texts[number][:60]!r}")
        self._seen += len(texts)
        return tokens, lengths


def checked(name: str, reference: Tokenizer) -> Encode:
    """The encoder of an engine, `Checked`; the reference as it is.

    Raises Mismatch when it cannot be opened, as where a build goes on without it.
    """
    if name == REFERENCE:
        return reference.encode_batch
    try:
        return Checked(open_engine(name, reference), reference).encode_batch
    except _ENDINGS:
        raise
    except BaseException as error:
        raise Mismatch(f"cannot be opened ({_line(error)})") from error


def choose(asked: str, reference: Tokenizer, samples: Sequence[str], warn: Callable[[str], None]) -> str:
    """The name of the engine to use: the one asked for, or for "auto" the fastest, that agrees with the reference.

    `warn` is told about engines that do not agree. Raises ConfigError when the one asked for cannot be had.
    """
    if asked == REFERENCE:
        return REFERENCE
    for name in FASTEST_FIRST if asked == "auto" else (asked,):
        try:
            encode = open_engine(name, reference)
        except ImportError as error:
            if asked != "auto":
                raise ConfigError(f"backend is {asked}, which is not installed; run: pip install {asked}") from error
            continue
        except _ENDINGS:
            raise
        except BaseException as error:
            if asked != "auto":
                warn(f"backend {name} cannot read {reference.path} ({_line(error)}); using its own library instead")
            continue
        different = first_difference(encode, reference, [*PROBES, *_with_special(reference), *samples])
        if different is None:
            return name
        warn(f"backend {name} gives other tokens than {reference.path} for {different[:60]!r}; it is not used")
    return REFERENCE


def open_engine(name: str, reference: Tokenizer) -> Encode:
    """The encoder of an engine. Raises ImportError where it is not installed, ValueError for a tokenizer that it
    cannot do."""
    if name == REFERENCE:
        return reference.encode_batch
    key = (name, reference.sha256, getattr(reference, "special_in_text", None))
    if key not in _opened:
        _opened.clear()  # a process works with one
        _opened[key] = {"gigatoken": _gigatoken, "tiktoken": _tiktoken}[name](reference)
    return _opened[key]


def first_difference(encode: Encode, reference: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first of the texts that gets other tokens."""
    try:
        tokens, lengths = encode(texts)
    except _ENDINGS:
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {_line(error)}"
    expected, expected_lengths = reference.encode_batch(texts)
    if np.array_equal(lengths, expected_lengths) and np.array_equal(tokens, expected):
        return None
    ends, expected_ends = np.cumsum(lengths), np.cumsum(expected_lengths)
    for i, text in enumerate(texts):
        mine = tokens[ends[i] - lengths[i] : ends[i]]
        if not np.array_equal(mine, expected[expected_ends[i] - expected_lengths[i] : expected_ends[i]]):
            return text
    raise AssertionError("arrays differ, their parts do not")


def _with_special(reference: Tokenizer) -> list[str]:
    return [text for name in reference.special[:50] for text in (name, f"a{name}b {name} c")]


def _gigatoken(reference: Tokenizer) -> Encode:
    import gigatoken

    literal: list[str] = []
    if isinstance(reference, TokenizersTokenizer):
        content = orjson.loads(reference.path.read_bytes())
        if not reference.special_in_text:
            # It knows no switch for this, but what is not declared special is read as text.
            content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        engine = gigatoken.Tokenizer.from_json(orjson.dumps(content))
    elif isinstance(reference, SentencePieceTokenizer):
        engine = gigatoken.Tokenizer.from_sentencepiece(reference.path)
        literal = reference.special  # these it always reads as special tokens

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # one by one: its batches come as awkward arrays, whose library takes 0.4 CPU-s to load and gains nothing here
        parts = [engine.encode(text) for text in texts]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return (np.concatenate(parts) if parts else np.empty(0, np.uint32)).view(np.int32), lengths

    return _with_literals(encode, reference, literal) if literal else encode


def _with_literals(encode: Encode, reference: Tokenizer, literal: list[str]) -> Encode:
    """`encode`, with the documents that spell one of `literal` out given to the reference."""

    def careful(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        odd = [i for i, text in enumerate(texts) if any(name in text for name in literal)]
        if not odd:
            return encode(texts)
        parts, lengths = [], []
        for begin, end in pairwise([-1, *odd, len(texts)]):
            for run, some in ((encode, texts[begin + 1 : end]), (reference.encode_batch, texts[end : end + 1])):
                if some:
                    tokens, counts = run(some)
                    parts.append(tokens)
                    lengths.append(counts)
        return np.concatenate(parts), np.concatenate(lengths)

    return careful


# What ByteLevel splits by when its tokenizer.json gives no pattern of its own (GPT-2's).
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _tiktoken(reference: Tokenizer) -> Encode:
    import tiktoken

    if not isinstance(reference, TokenizersTokenizer) or reference.special_in_text:
        raise ValueError("only a tokenizer.json whose special tokens are text in texts can be converted")
    content = orjson.loads(reference.path.read_bytes())
    ranks = _ranks(content)
    # With no special token at all it looks for the empty string, at each character: half of its time. This one is
    # never allowed, so it is ordinary text wherever it stands.
    never = {"<|never|>": max(ranks.values()) + 1}
    encoding = tiktoken.Encoding("converted", pat_str=_pattern(content), mergeable_ranks=ranks, special_tokens=never)

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return (np.concatenate(parts) if parts else np.empty(0, np.uint32)).astype(np.int32), lengths

    return encode


def _pattern(content: dict[str, Any]) -> str:
    """The regular expression that a byte-level tokenizer.json splits texts by. Raises ValueError for other kinds."""
    split = content["pre_tokenizer"] or {}
    steps = split.get("pretokenizers", [split])
    last = steps[-1]
    if content["normalizer"] or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError("not a plain byte-level tokenizer")
    if len(steps) == 1 and last.get("use_regex", True):
        return _GPT2_PATTERN
    if len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex", True):
        return str(steps[0]["pattern"]["Regex"])
    raise ValueError("its splitting is not one regular expression")


def _ranks(content: dict[str, Any]) -> dict[bytes, int]:
    """Token bytes to ids, which must also be the order of the merges. Raises ValueError where they are not."""
    model = content["model"]
    if model.get("type") != "BPE" or any(not token["special"] for token in content["added_tokens"]):
        raise ValueError("not byte-pair encoding alone")
    special = {token["content"] for token in content["added_tokens"]}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    ids = [model["vocab"]["".join(merge)] for merge in merges]
    if ids != sorted(ids):
        raise ValueError("its token ids are not in the order of its merges")
    to_byte = _byte_of_character()
    return {
        bytes(to_byte[character] for character in token): number
        for token, number in model["vocab"].items()
        if token not in special
    }


def _byte_of_character() -> dict[str, int]:
    """The printable character by which byte-level tokenizers (since GPT-2) write each byte, inverted."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
