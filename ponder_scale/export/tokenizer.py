"""Write the tokenizer of an exported folder, so that `AutoTokenizer` of transformers 4 and 5 can read it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ponder_scale.errors import TokenizerError
from ponder_scale.files.links import resolved

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
# Keys that name code, or a place to load code from.
_NAMING = ("auto_map", "custom_pipelines", "name_or_path", "_name_or_path", "trust_remote_code")
SAMPLES = ("def read(self):\n    return 1", " leading and  double spaces", "naïve café — 你好", "\n\n\ttabs", "a")


def bundle_tokenizer(source: Path, out: Path, *, eod_id: int | list[int] | None) -> None:
    """Copy a tokenizer's files from `source` and add what `AutoTokenizer` needs.

    Args:
        eod_id: end of a text, as in a transformers configuration. If there are several, the first one is used.

    Raises:
        TokenizerError: there is no tokenizer in `source`, or transformers reads its SentencePiece model but encodes
            text differently.
    """
    end = next(iter(eod_id), None) if isinstance(eod_id, list) else eod_id
    for name in FILES:
        copy_file(source, name, out)
    config = tokenizer_config(source)
    if (out / "tokenizer.json").is_file():
        # transformers 5 writes a class name that transformers 4 does not know.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if not config.get("eos_token"):
            config["eos_token"] = _token(out / "tokenizer.json", end)
        write_config(out, config)
        return
    models = sorted(source.glob("*.model"))
    if not models:
        raise TokenizerError(f"{source}: neither tokenizer.json nor a SentencePiece .model in it")
    shutil.copyfile(resolved(source, models[0]), out / SENTENCEPIECE)
    write_config(out, {**_sentencepiece_config(out / SENTENCEPIECE, end), **config})
    _check_sentencepiece(out)


def copy_file(source: Path, name: str, out: Path) -> bool:
    """Copy a file of `source`, without its mode. Returns whether there was a file of this name.

    Raises:
        TokenizerError: it is a link that leads out of `source`.
    """
    path = source / name
    if not path.is_symlink() and not path.is_file():
        return False
    shutil.copyfile(resolved(source, path), out / name)
    return True


def tokenizer_config(source: Path) -> dict[str, Any]:
    """The contents of tokenizer_config.json, without keys that name code or files to load. Raises like `read_json`."""
    config = read_json(source, CONFIG)
    return {key: value for key, value in config.items() if key not in _NAMING and not key.endswith(("_file", "_path"))}


def read_json(source: Path, name: str) -> dict[str, Any]:
    """The keys and values of a JSON file of `source`. Empty if there is no file of this name.

    Raises:
        TokenizerError: it cannot be read, or is a link that leads out of `source`.
    """
    path = source / name
    if not path.is_symlink() and not path.is_file():
        return {}
    try:
        content = json.loads(resolved(source, path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{path}: cannot be read: {error}; remove it, or put back the tokenizer's own file"
        ) from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: expected keys and values")
    return content


def write_config(out: Path, config: dict[str, Any]) -> None:
    """Write tokenizer_config.json."""
    (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        "add_prefix_space": processor.encode("a", out_type=str)[0].startswith("\u2581"),  # dummy prefix
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        **{name: processor.id_to_piece(token) for name, token in pieces.items() if token is not None and token >= 0},
    }


def _check_sentencepiece(out: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    ours = sentencepiece.SentencePieceProcessor(model_file=str(out / SENTENCEPIECE))
    with tempfile.TemporaryDirectory() as alone:  # beside a config.json, the loader would look for code there
        for name in (CONFIG, SENTENCEPIECE, *FILES):
            copy_file(out, name, Path(alone))
        try:
            theirs = AutoTokenizer.from_pretrained(alone, trust_remote_code=False)
            found = {text: theirs(text, add_special_tokens=False)["input_ids"] for text in SAMPLES}
        except Exception as error:  # tokenizer classes raise anything for a configuration that they do not expect
            reason = " ".join(str(error).split())[:300]
            raise TokenizerError(f"{out / CONFIG}: transformers cannot load the tokenizer: {reason}") from error
    for text, got in found.items():
        expected = ours.encode(text)
        if got != expected:
            raise TokenizerError(
                f"{out / SENTENCEPIECE}: transformers encodes {text!r} as {got}, but SentencePiece as {expected}; "
                "convert the model to a tokenizer.json that agrees and build the shards with it"
            )
