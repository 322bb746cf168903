"""An exported folder with a tokenizer, and shards of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.export.folder import write_folder
from ponder_scale.shards.format import ShardSet
from ponder_scale.shards.manifest import tokenizer_sha256
from tests.model.architectures import make_confident

VOCABULARY, POSITIONS = 300, 32


@pytest.fixture(scope="session")
def model() -> Any:
    fields = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "eos_token_id": 0}
    return make_confident("llama", pondering_steps=2, scale_embeds=True, **fields)


@pytest.fixture(scope="session")
def folder(model: Any, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    write_folder(out, model.config, model.named_parameters(), dtype="float32", card=str, tokenizer=tiny_tokenizer)
    return out


@pytest.fixture(scope="session")
def shards(tiny_shards: Callable[..., ShardSet], tiny_tokenizer: Path) -> tuple[Path, Path]:
    tokenizer = tokenizer_sha256([tiny_tokenizer / "tokenizer.json"])
    made = [
        tiny_shards(vocab_size=VOCABULARY, heldout=(size,), seed=seed, tokenizer=tokenizer)
        for seed, size in ((1, 400), (2, 150))
    ]
    return made[0].folder, made[1].folder
