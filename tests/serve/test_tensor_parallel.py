"""Two ranks that share the weights, the vocabulary among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.agreement import Case

CASES: dict[str, dict[str, Any]] = {  # each of which starts two processes more
    "llama, top-K": {"pondering_steps": 2, "pondering_top_k": 10, "pondering_temperature": 0.7},
    "gpt_neox": {"architecture": "gpt_neox", "pondering_steps": 2},
    "gpt2, tied": {"architecture": "gpt2", "pondering_steps": 2, "tie_word_embeddings": True},
    "olmo2": {"architecture": "olmo2", "pondering_steps": 2, "initial_scale": 2.0},
}
Served = dict[str, tuple[Case, dict[str, Any]]]


@pytest.fixture(scope="module")
def served(vllm: None, run: Callable[..., Any], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    base, engine = tmp_path_factory.mktemp("served"), {"tensor_parallel_size": 2}
    cases = {
        name: Case(base / str(place), tokenizer, engine=engine, **settings)
        for place, (name, settings) in enumerate(CASES.items())
    }
    # ranks may share a core: vLLM else wants a NUMA node for each
    found = run({name: case.job for name, case in cases.items()}, VLLM_CPU_OMP_THREADS_BIND="nobind")
    return {name: (case, found[name]) for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_vocabulary_in_parts_is_served_token_for_token(name: str, served: Served) -> None:
    case, found = served[name]
    case.check(found)
