"""The number of bytes of text that each token stands for. It makes losses of different tokenizers comparable.

The bytes are those of the decoded text in UTF-8. A special token, and a token that begins or ends a document, stands
for no bytes. Its loss counts all the same, because the end of a text has to be predicted, too. A table exists only for
tokenizers whose text is the texts of their tokens one after another. Other tokenizers are refused, never estimated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ponder_scale.data.sequences import IGNORE_INDEX
from ponder_scale.errors import TokenizerError
from ponder_scale.shards.format import ShardSet

SPACE = "\u2581"  # how SentencePiece and its like write a space
UNKNOWN = -1  # stands for the bytes of a token whose text is not known
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Decoders that give the texts of the tokens one after another. Others join words by rules of their own.
_DECODERS = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


@dataclass(frozen=True)
class TextBytes:
    """The bytes of the V tokens of a tokenizer.

    Args:
        sizes: (V,) int64, the bytes that each token stands for, or `UNKNOWN`.
        spaced: (V,) bool, whether it begins with a space. The tokenizer also puts this space before a text without one.
        begins: (V,) bool, whether a new text may follow it.
    """

    sizes: Tensor
    spaced: Tensor
    begins: Tensor

    def of(self, before: Tensor, labels: Tensor) -> tuple[int, int]:
        """The bytes of the labels that count, and the number of labels among them whose bytes are not known.

        Args:
            before: (B, T) int64, the token before each label.
            labels: (B, T) int64, with `IGNORE_INDEX` for labels that do not count.
        """
        counts = labels != IGNORE_INDEX
        before, labels = before[counts], labels[counts]
        sizes = self.sizes[labels]
        known = sizes != UNKNOWN
        added = self.spaced[labels] & self.begins[before] & known
        return int(sizes[known].sum() - added.sum()), int((~known).sum())


def text_bytes(sources: Iterable[ShardSet], tokenizer: Path | None = None) -> TextBytes:
    """The table of the one tokenizer that all these shards were made with.

    Args:
        tokenizer: folder with its files. The default is that of the first source.

    Raises:
        TokenizerError: the bytes are not known exactly. The message says why.
    """
    sources = list(sources)
    folder = tokenizer or sources[0].tokenizer_folder
    ends = {i for each in sources for i in (each.manifest.eod_id, each.manifest.bos_id) if i is not None}
    vocabulary = max(each.manifest.vocab_size for each in sources)
    file, models = folder / "tokenizer.json", sorted(folder.glob("*.model"))
    if file.is_file():
        table = _of_json(file, vocabulary, ends)
    elif models:
        table = _of_pieces(models[0], vocabulary, ends)
    else:
        raise TokenizerError(f"{folder}: no tokenizer.json or SentencePiece .model in it, so bytes are not known")
    if table.spaced.any() and not table.begins.any():
        raise TokenizerError(
            f"{folder}: the tokenizer puts a space before each text, but the shards do not mark where a text begins"
        )
    return table


def _of_json(path: Path, vocabulary: int, ends: set[int]) -> TextBytes:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        model, added = content["model"], content.get("added_tokens") or []
        entries = model["vocab"]
        pairs = entries.items() if isinstance(entries, dict) else ((each[0], i) for i, each in enumerate(entries))
        tokens = {int(i): str(token) for token, i in pairs}
        steps = _steps(content.get("decoder"))
        prefix = _prefix(content)
        special = {int(each["id"]) for each in added if each["special"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TokenizerError(f"{path}: cannot be read as a tokenizer ({type(error).__name__}: {error})") from error
    kinds = [str(step.get("type")) for step in steps]
    strange = [kind for kind in kinds if kind not in _DECODERS] or ([] if kinds else ["no decoder"])
    if strange or model.get("type") not in ("BPE", "Unigram"):
        raise TokenizerError(
            f"{path}: a {model.get('type')} model with {strange[0] if strange else 'a decoder'}; bytes are known only "
            "for BPE and Unigram with the decoder of byte-level BPE or SentencePiece"
        )
    texts = {i: _decoded(token, steps) for i, token in tokens.items()}
    for each in added:
        # It stands for its own letters. If it also takes the white space around it, the size of that is not known.
        takes = each.get("lstrip") or each.get("rstrip")
        texts[int(each["id"])] = None if takes and not each["special"] else str(each["content"]).encode()
    for i in special | ends:
        texts[i] = b""
    unknown = _unknown(model, tokens)
    if unknown is not None and "ByteLevel" not in kinds:  # if every byte has a token, no text is unknown
        texts[unknown] = None
    begins = ends if prefix == "first" else ends | {int(each["id"]) for each in added}
    return _table(texts, vocabulary, begins if prefix else set(), prefix is not None)


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """The parts of a decoder, in their order."""
    if decoder is None:
        return []
    return (
        [part for each in decoder["decoders"] for part in _steps(each)] if decoder["type"] == "Sequence" else [decoder]
    )


def _prefix(content: dict[str, Any]) -> str | None:
    """Where the tokenizer adds a space that its decoder removes: before the `first` piece of a text, before each piece
    between added tokens (`always`), or nowhere.
    """
    parts = [part for key in ("pre_tokenizer", "decoder") for part in _parts(content.get(key))]
    for part in parts:
        if part["type"] == "Metaspace":
            scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
            return None if scheme == "never" else str(scheme)
    if any(part["type"] == "Prepend" for part in _parts(content.get("normalizer"))):
        return "always"
    return "first" if any(part["type"] == "Strip" and part.get("start") for part in parts) else None


def _parts(value: Any) -> list[dict[str, Any]]:
    """The parts of a normalizer, a pre-tokenizer or a decoder."""
    if value is None:
        return []
    inner = next((value[key] for key in ("normalizers", "pretokenizers", "decoders") if key in value), None)
    return [value] if inner is None else [part for each in inner for part in _parts(each)]


def _decoded(token: str, steps: list[dict[str, Any]]) -> bytes | None:
    """The bytes of a token within a text. None if they are not known."""
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            # Each byte has one letter. Other letters cannot be decoded.
            return bytes(len(token)) if all(letter in _LETTERS for letter in token) else None
        if kind == "Replace":
            old = step["pattern"].get("String")
            if old is None:
                return None
            token = token.replace(old, step["content"])
        elif kind == "Metaspace":
            token = token.replace(step.get("replacement", SPACE), " ")
        elif kind == "ByteFallback" and _BYTE.fullmatch(token):
            return bytes(1)
        elif kind == "Strip" and step.get("stop"):
            return None
    return token.encode()


def _letters() -> set[str]:
    """The letters that byte-level tokenizers (GPT-2) write bytes with: visible bytes as they are, others from 256."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {chr(i) for i in seen} | {chr(256 + i) for i in range(256 - len(seen))}


_LETTERS = _letters()


def _unknown(model: dict[str, Any], tokens: dict[int, str]) -> int | None:
    """The id of the token that stands for text without a token."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    name = model.get("unk_token")
    return next((i for i, token in tokens.items() if token == name), None) if name is not None else None


def _of_pieces(path: Path, vocabulary: int, ends: set[int]) -> TextBytes:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.Load(str(path))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{path}: cannot be read as a SentencePiece model, so bytes are not known") from error
    alone = "".join(pieces.encode("a", out_type=str))
    if alone.endswith(SPACE):
        raise TokenizerError(f"{path}: its pieces end with the space after them, so bytes are not known")
    texts: dict[int, bytes | None] = {}
    for i in range(pieces.vocab_size()):
        if pieces.is_control(i) or i in ends:
            texts[i] = b""
        elif pieces.is_byte(i):
            texts[i] = bytes(1)
        else:
            told = not pieces.is_unknown(i) and not pieces.is_unused(i)
            texts[i] = pieces.id_to_piece(i).replace(SPACE, " ").encode() if told else None
    prefix = alone.startswith(SPACE)
    return _table(texts, vocabulary, ends if prefix else set(), prefix)


def _table(texts: dict[int, bytes | None], vocabulary: int, begins: set[int], prefix: bool) -> TextBytes:
    size = max(vocabulary, 1 + max(texts, default=0))
    sizes = torch.full((size,), UNKNOWN, dtype=torch.int64)
    spaced, after = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    for i, text in texts.items():
        if text is not None:
            sizes[i] = len(text)
            spaced[i] = prefix and text.startswith(b" ")
    after[sorted(begins)] = True
    return TextBytes(sizes, spaced, after)
