"""The tokenizer of an exported folder, readable by `AutoTokenizer` of transformers 4 and 5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ponder_scale.errors import TokenizerError

FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
CONFIG = "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"
SAMPLES = ("def read(self):\n    return 1", " leading and  double spaces", "naïve café — 你好", "\n\n\ttabs", "a")


def bundle_tokenizer(source: Path, out: Path, *, eod_id: int | list[int] | None) -> None:
    """Copy a tokenizer's files from `source` and complete what `AutoTokenizer` needs.

    Args:
        eod_id: as a configuration of transformers has it: of several the first is the text's end.

    Raises:
        TokenizerError: transformers reads the SentencePiece model, but encodes text differently.
    """
    end = next(iter(eod_id), None) if isinstance(eod_id, list) else eod_id
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8")) if (source / CONFIG).is_file() else {}
    if (out / "tokenizer.json").is_file():
        # transformers 5 writes its own class name there, which transformers 4 does not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if not config.get("eos_token"):
            config["eos_token"] = _token(out / "tokenizer.json", end)
        _write(out / CONFIG, config)
        return
    models = sorted(source.glob("*.model"))
    if not models:
        raise TokenizerError(f"{source}: neither tokenizer.json nor a SentencePiece .model in it")
    shutil.copyfile(models[0], out / SENTENCEPIECE)
    _write(out / CONFIG, {**_sentencepiece_config(out / SENTENCEPIECE, end), **config})
    _check_sentencepiece(out)


def _token(path: Path, token_id: int | None) -> str | None:
    if token_id is None:
        return None
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path)).id_to_token(token_id)


def _sentencepiece_config(model: Path, end: int | None) -> dict[str, Any]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = {"eos_token": end, "unk_token": processor.unk_id(), "bos_token": processor.bos_id()}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_prefix_space": processor.encode("a", out_type=str)[0].startswith("\u2581"),  # the model's dummy prefix
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        **{name: processor.id_to_piece(token) for name, token in pieces.items() if token is not None and token >= 0},
    }


def _check_sentencepiece(out: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    ours = sentencepiece.SentencePieceProcessor(model_file=str(out / SENTENCEPIECE))
    theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    for text in SAMPLES:
        got, expected = theirs(text, add_special_tokens=False)["input_ids"], ours.encode(text)
        if got != expected:
            raise TokenizerError(
                f"{out / SENTENCEPIECE}: transformers encodes {text!r} as {got}, SentencePiece as {expected}; "
                "convert the model to a tokenizer.json that agrees and build the shards with it"
            )


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
