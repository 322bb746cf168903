"""Two ranks that share the weights, the vocabulary among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.agreement import Case

CASES: dict[str, dict[str, Any]] = {
    "llama": {"pondering_steps": 2, "initial_scale": 2.0},
    "llama, top-K": {"pondering_steps": 2, "pondering_top_k": 10, "pondering_temperature": 0.7},
    "gpt_neox": {"architecture": "gpt_neox", "pondering_steps": 2},
    "gpt2": {"architecture": "gpt2", "pondering_steps": 2},
    "olmo2": {"architecture": "olmo2", "pondering_steps": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_a_vocabulary_in_parts_is_served_token_for_token(
    name: str, run: Callable[..., Any], tokenizer: Path, tmp_path: Path
) -> None:
    case = Case(tmp_path / "model", tokenizer, engine={"tensor_parallel_size": 2}, **CASES[name])
    case.check(run({name: case.job})[name])
