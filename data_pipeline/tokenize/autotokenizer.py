"""Check that transformers' AutoTokenizer, which generation will use, encodes as the tokenizer of a build does.

AutoTokenizer reads more than tokenizer.json. The settings beside that file can put a space before a text or add tokens.
It runs in its own process, once for each build, because loading it takes longer than a small build and loads torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.tokenize.tokenizer import CONFIG, SentencePieceTokenizer, Tokenizer, encoder, save
from ponder_scale.errors import TokenizerError

SECONDS = 300  # time limit for its answer
TEXTS = (
    "",
    "word",
    " word  and\n\n words\t\r\n",
    "Größe, naïve 数学 हिन्दी e\u0301 \ufb01 \u00a0 \U0001f600",
    "It's 3.14; don't (x != 1) {a: [b]} <c> www.d.org ... don 't . ,",
    "A" * 50 + "=" * 50,
)
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # they use tokenizer.json as it is
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_HARMLESS = ("clean_up_tokenization_spaces", "model_max_length", "chat_template", "tokenizer_class")
_REMEDY = (
    "tokens of this build would not be those of the exported model; make a folder in which both agree by "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW), or give a folder that holds {name} alone"
)


def check_agreement(tokenizer: Tokenizer, own_end: bool, warn: Callable[[str], None]) -> None:
    """Raise TokenizerError if AutoTokenizer has other tokens for the same files, or encodes texts differently.

    own_end: whether the build uses the tokenizer's own end token. `warn` is called if AutoTokenizer cannot be run, and
    for differences of a SentencePiece model, which transformers converts.
    """
    settings = tokenizer.path.with_name(CONFIG)
    if not settings.is_file() or _is_plain(tokenizer, settings):
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tokenizer"
        save(tokenizer, folder)  # with the file names that a folder of shards uses
        try:
            theirs = _ask(folder, [*TEXTS, *_with_tokens(tokenizer.special)])
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            warn(f"{tokenizer.path.parent}: cannot be compared with transformers' AutoTokenizer: {_reason(error)}")
            return
    difference = _difference(tokenizer, theirs, own_end)
    if difference and isinstance(tokenizer, SentencePieceTokenizer):
        warn(f"{tokenizer.path}: {difference}; compare the exported model's tokens with those of this build")
    elif difference:
        raise TokenizerError(f"tokenizer {settings}: {difference}; {_REMEDY.format(name=tokenizer.path.name)}")


def _is_plain(tokenizer: Tokenizer, settings: Path) -> bool:
    """Whether the files beside a tokenizer clearly change nothing."""
    content: Any = json.loads(settings.read_bytes())
    others = [settings.with_name(name) for name in ("special_tokens_map.json", "added_tokens.json")]
    if content.get("tokenizer_class") not in _PLAIN_CLASSES or any(path.exists() for path in others):
        return False
    for key, value in content.items():
        token = value.get("content") if isinstance(value, dict) else value
        if key in _SPECIAL and token is not None and token not in tokenizer.special:
            return False
        if key not in _SPECIAL and key not in _HARMLESS:
            return False
    return True


def _difference(tokenizer: Tokenizer, theirs: dict[str, Any], own_end: bool) -> str | None:
    own = tokenizer.path.name
    if theirs["vocab_size"] > tokenizer.vocab_size:
        return (
            f"AutoTokenizer has {theirs['vocab_size']:,} tokens with these settings, {own} {tokenizer.vocab_size:,} "
            f"(the last is {theirs['last']!r})"
        )
    if own_end and theirs["eos"] is not None and theirs["eos"] != tokenizer.eod_id:
        return f"AutoTokenizer ends texts with token {theirs['eos']:,}, and {own} with {tokenizer.eod_id:,}"
    encode = encoder(tokenizer, special_in_text=not theirs["splits_special"])
    for text, tokens in zip(theirs["texts"], theirs["tokens"], strict=True):
        found = encode(text)
        if found != tokens:
            return f"AutoTokenizer encodes {text[:40]!r} as {_shown(tokens)}, and {own} as {_shown(found)}"
    return None


def _shown(tokens: list[int]) -> str:
    return f"[{', '.join(map(str, tokens[:6]))}{', ...' if len(tokens) > 6 else ''}]"


def _with_tokens(names: list[str]) -> list[str]:
    """Texts that contain these tokens. An added token may absorb the white space around it."""
    return [text for name in names[:50] for text in (name, f"a{name}b {name}  c {name.lower()}")]


def _ask(folder: Path, texts: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.tokenize.autotokenizer"],
        input=json.dumps({"folder": str(folder), "texts": texts}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _reason(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return " ".join(lines[-1].split())[:200] if lines else type(error).__name__


def _answer() -> None:
    """Print AutoTokenizer's answer for the folder and texts given on stdin. Runs in its own process."""
    # a tokenizer does not need it, and loading it takes seconds
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers import AutoTokenizer

    asked = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
    vocabulary = tokenizer.get_vocab()
    texts = [*asked["texts"], *_with_tokens(sorted(tokenizer.get_added_vocab()))]
    answer = {
        "vocab_size": max(vocabulary.values(), default=-1) + 1,
        "last": max(vocabulary, key=lambda name: vocabulary[name], default=""),
        "eos": tokenizer.eos_token_id,
        "splits_special": bool(getattr(tokenizer, "split_special_tokens", False)),
        "texts": texts,
        "tokens": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    _answer()
