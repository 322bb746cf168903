"""Faster engines for a tokenizer. They are used only while they give the same tokens as the tokenizer's own library.

tiktoken and gigatoken are compared with the reference twice: before a build on difficult texts and documents of the
corpus, and during it on a sample of every unit. If they differ, the reference processes that unit again.
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
SAMPLE_CHARACTERS = 2**16  # longer documents are not sampled, because the reference needs much memory for them
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

_ENDINGS = (KeyboardInterrupt, SystemExit)  # every other error is a failure of the engine, even a panic of Rust

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]

_opened: dict[tuple[Any, ...], Encode] = {}  # kept, because loading an engine takes longer than a small build


class Mismatch(Exception):
    """An engine failed or gave other tokens than the reference. The message continues a sentence that begins with its
    name.
    """


class Checked:
    """An engine that is compared with the reference on the first and then every SAMPLE_EVERY-th document."""

    def __init__(self, encode: Encode, reference: Tokenizer) -> None:
        self._encode, self._reference = encode, reference
        self._seen = 0

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Like `Tokenizer.encode_batch`. Raises Mismatch if it fails or gives other tokens for a sampled document."""
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
    """The `Checked` encoder of an engine, or that of the reference itself.

    Raises Mismatch if the engine cannot be opened, for example when a build continues without it.
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
    """The name of an engine that agrees with the reference: the requested one, or the fastest for "auto".

    `warn` is called for each engine that does not agree. Raises ConfigError if the requested engine is not installed.
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
    """The encoder of an engine.

    Raises ImportError if it is not installed, ValueError for a tokenizer that it does not support.
    """
    if name == REFERENCE:
        return reference.encode_batch
    key = (name, reference.sha256, getattr(reference, "special_in_text", None))
    if key not in _opened:
        _opened.clear()  # a process needs only one
        _opened[key] = {"gigatoken": _gigatoken, "tiktoken": _tiktoken}[name](reference)
    return _opened[key]


def first_difference(encode: Encode, reference: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text that gets other tokens, or a description of the engine's error. None if all agree."""
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
            # It has no switch for this, but reads tokens that are not declared special as text.
            content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        engine = gigatoken.Tokenizer.from_json(orjson.dumps(content))
    elif isinstance(reference, SentencePieceTokenizer):
        engine = gigatoken.Tokenizer.from_sentencepiece(reference.path)
        literal = reference.special  # it always reads these as special tokens

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # One by one: its batches are awkward arrays, whose library takes 0.4 CPU-s to load and gains nothing here.
        parts = [engine.encode(text) for text in texts]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return (np.concatenate(parts) if parts else np.empty(0, np.uint32)).view(np.int32), lengths

    return _with_literals(encode, reference, literal) if literal else encode


def _with_literals(encode: Encode, reference: Tokenizer, literal: list[str]) -> Encode:
    """`encode`, except that documents that spell out one of `literal` go to the reference."""

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


# The pattern by which ByteLevel splits if tokenizer.json has none of its own (GPT-2's).
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _tiktoken(reference: Tokenizer) -> Encode:
    import tiktoken

    if not isinstance(reference, TokenizersTokenizer) or reference.special_in_text:
        raise ValueError("only a tokenizer.json whose special tokens are text in texts can be converted")
    content = orjson.loads(reference.path.read_bytes())
    ranks = _ranks(content)
    # Without any special token it would search for the empty string at each character, which takes half of its time.
    # This token is never allowed, so it is ordinary text everywhere.
    never = {"<|never|>": max(ranks.values()) + 1}
    encoding = tiktoken.Encoding("converted", pat_str=_pattern(content), mergeable_ranks=ranks, special_tokens=never)

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return (np.concatenate(parts) if parts else np.empty(0, np.uint32)).astype(np.int32), lengths

    return encode


def _pattern(content: dict[str, Any]) -> str:
    """The regular expression by which a byte-level tokenizer.json splits texts. Raises ValueError for other kinds."""
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
    """The id of each token's bytes. Raises ValueError unless the ids are in the order of the merges."""
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
    """The byte for each printable character that byte-level tokenizers (since GPT-2) write for it."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
