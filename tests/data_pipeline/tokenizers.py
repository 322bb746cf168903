"""Tokenizers of a few words."""

import json

from tokenizers import Tokenizer, models


def bare(folder, vocabulary: list[str], **settings):
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
