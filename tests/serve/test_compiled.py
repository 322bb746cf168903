"""What vLLM compiles, its default: the whole recurrence, or every pass would run with the first one's slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.serve.agreement import BOUND, Case

COMPILED = {"enforce_eager": False, "max_num_seqs": 8}


def test_the_compiled_recurrence_is_served_token_for_token(
    run: Callable[..., Any], tokenizer: Path, tmp_path: Path
) -> None:
    case = Case(tmp_path / "model", tokenizer, pondering_steps=3, engine=COMPILED)
    found = run({"llama": case.job}, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    case.check(found["llama"])


def test_with_only_the_inner_model_compiled_the_passes_share_slots_and_decoding_is_wrong(
    run: Callable[..., Any], tokenizer: Path, tmp_path: Path
) -> None:
    case = Case(tmp_path / "model", tokenizer, pondering_steps=3, engine=COMPILED, broken="compile")
    found = run({"llama": case.job}, VLLM_CACHE_ROOT=str(tmp_path / "cache"))["llama"]
    assert "error" not in found, found["error"]
    assert found["tokens"] != [tokens for tokens, _, _ in case.expected]
    assert case.prompting(found) < BOUND  # which is why prompts alone prove nothing
