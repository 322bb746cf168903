"""What vLLM compiles, its default: the whole recurrence, or every pass would run with the first one's slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.agreement import BOUND, Case

COMPILED = {"enforce_eager": False, "max_num_seqs": 8}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"architecture": "gpt2"},
    "gpt_neox": {"architecture": "gpt_neox"},
    "olmo2": {"architecture": "olmo2"},
    "llama, only the inner model": {"broken": "compile"},  # last, as it breaks the process
}
Served = dict[str, tuple[Case, dict[str, Any]]]


def test_the_compiled_recurrence_is_served_token_for_token(
    run: Callable[..., Any], tokenizer: Path, tmp_path: Path
) -> None:
    case = Case(tmp_path / "model", tokenizer, pondering_steps=2, engine=COMPILED)
    found = run({"llama": case.job}, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    case.check(found["llama"])


@pytest.fixture(scope="module")
def traced(run: Callable[..., Any], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Traced and held without guards as for the compiler, which would take minutes to make code of each."""
    base = tmp_path_factory.mktemp("traced")
    cases = {
        name: Case(base / str(place), tokenizer, pondering_steps=2, engine=COMPILED, **settings)
        for place, (name, settings) in enumerate(CASES.items())
    }
    jobs = {name: case.job for name, case in cases.items()}
    found = run(jobs, VLLM_CACHE_ROOT=str(base / "cache"), VLLM_CPU_CI_ENV="1")
    return {name: (case, found[name]) for name, case in cases.items()}


@pytest.mark.parametrize("name", [name for name, settings in CASES.items() if "broken" not in settings])
def test_the_traced_recurrence_of_the_others_is_served_token_for_token(name: str, traced: Served) -> None:
    case, found = traced[name]
    case.check(found)


def test_with_only_the_inner_model_traced_the_passes_share_slots_and_decoding_is_wrong(traced: Served) -> None:
    case, found = traced["llama, only the inner model"]
    assert "error" not in found, found["error"]
    assert found["tokens"] != [tokens for tokens, _, _ in case.expected]
    assert case.prompting(found) < BOUND  # which is why prompts alone prove nothing
