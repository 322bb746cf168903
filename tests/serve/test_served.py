"""Folders as exported, in vLLM on a CPU, against transformers: tokens equal, log-probabilities within 1e-4 nats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.agreement import BOUND, Case

# prefills of 100 tokens in pieces of 48 beside decoding, with too few blocks for all requests
CRAMPED = {"block_size": 32, "max_num_batched_tokens": 48, "max_num_seqs": 8, "num_gpu_blocks_override": 14}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"architecture": "gpt2", "pondering_steps": 2, "tie_word_embeddings": True},
    "gpt2, untied, replace": {
        "architecture": "gpt2",
        "pondering_steps": 1,
        "tie_word_embeddings": False,
        "residual": "replace",
    },
    "gpt_neox": {"architecture": "gpt_neox", "pondering_steps": 2},
    "gpt_neox, tied, tau": {
        "architecture": "gpt_neox",
        "pondering_steps": 1,
        "tie_word_embeddings": True,
        "pondering_temperature": 0.7,
    },
    "olmo2": {"architecture": "olmo2", "pondering_steps": 2, "initial_scale": 2.0},
    "olmo2, tied, hidden": {
        "architecture": "olmo2",
        "pondering_steps": 2,
        "tie_word_embeddings": True,
        "feedback": "hidden",
        "scale_embeds": False,
    },
    "llama, cramped": {"pondering_steps": 3, "engine": CRAMPED},
    "llama, S = 0": {"pondering_steps": 0},
    "llama, tied, S = 8": {"pondering_steps": 8, "tie_word_embeddings": True},
    "llama, top-K": {"pondering_steps": 2, "pondering_top_k": 10, "pondering_temperature": 0.7},
    "llama, restart": {"pondering_steps": 2, "pondering_temperature": 0.5, "residual": "restart"},
    "llama, looped": {"pondering_steps": 2, "feedback": "hidden", "residual": "replace", "scale_embeds": False},
    "llama, fewer steps": {
        "pondering_steps": 3,
        "engine": {"hf_overrides": {"pondering_steps": 1}},
        "options": {"pondering_steps": 1},
    },
    # last, as it breaks the process
    "llama, padding in the softmax": {"pondering_steps": 3, "broken": "padding"},
}
Served = dict[str, tuple[Case, dict[str, Any]]]


@pytest.fixture(scope="module")
def served(vllm: None, run: Callable[..., Any], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """All in one process, which imports vLLM once."""
    base = tmp_path_factory.mktemp("served")
    cases = {
        name: Case(base / str(place), tokenizer, **settings) for place, (name, settings) in enumerate(CASES.items())
    }
    found = run({name: case.job for name, case in cases.items()})
    return {name: (case, found[name]) for name, case in cases.items()}


@pytest.mark.parametrize("name", [name for name, settings in CASES.items() if "broken" not in settings])
def test_a_folder_is_served_token_for_token(name: str, served: Served) -> None:
    case, found = served[name]
    case.check(found)
    assert len({tuple(tokens[:3]) for tokens in found["tokens"]}) > 4  # the prompts do matter


def test_prefills_came_in_pieces_requests_were_preempted_and_prefixes_were_cached(served: Served) -> None:
    _, found = served["llama, cramped"]
    assert found["preemptions"] > 0
    assert max(found["cached"]) > 0


def test_each_pass_of_each_layer_has_a_slot_and_weights_exist_once(served: Served) -> None:
    for case, found in served.values():
        steps = case.model.config.pondering_steps
        if case.job["engine"].get("hf_overrides"):
            steps = case.job["engine"]["hf_overrides"]["pondering_steps"]
        assert found["slots"] == (steps + 1) * case.model.config.num_hidden_layers
        padding = 48 * case.model.config.hidden_size * (1 if case.model.config.tie_word_embeddings else 2)
        assert found["parameters"] == case.model.num_parameters() + padding


def test_rows_that_pad_the_vocabulary_would_change_the_text_s_probabilities(served: Served) -> None:
    case, found = served["llama, padding in the softmax"]
    assert case.decoding(found) > 5 * BOUND
    assert case.prompting(found) > 5 * BOUND
