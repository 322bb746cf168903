"""How answers of vLLM differ from those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.serve.folders import make_folder, make_model, prompts, reference

BOUND = 1e-4  # nats


class Case:
    """A folder, and what transformers says of it.

    Args:
        engine: arguments of vLLM's `LLM`.
        options: of transformers' forward and generation, for the reference.
        fields: of the configuration.
    """

    def __init__(
        self,
        out: Path,
        tokenizer: Path,
        architecture: str = "llama",
        *,
        engine: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        broken: str | None = None,
        **fields: Any,
    ) -> None:
        self.model = make_model(architecture, **fields)
        self.folder = make_folder(out, self.model, tokenizer)
        self.expected = reference(self.model, prompts(), **(options or {}))
        self.job = {"folder": str(out), "engine": engine or {}, "prompts": prompts(), "break": broken}

    def check(self, found: dict[str, Any]) -> None:
        """Raise AssertionError unless tokens are equal, cold and warm, and log-probabilities within `BOUND`."""
        assert "error" not in found, found["error"]
        assert found["tokens"] == [tokens for tokens, _, _ in self.expected]
        assert found["again"] == found["tokens"]
        assert self.decoding(found) < BOUND
        assert self.prompting(found) < BOUND

    def decoding(self, found: dict[str, Any]) -> float:
        """The largest difference of a generated token's log-probability, as long as the texts are the same."""
        worst = 0.0
        for said, mine, (tokens, theirs, _) in zip(found["tokens"], found["logprobs"], self.expected, strict=True):
            same = next((place for place in range(len(tokens)) if said[place] != tokens[place]), len(tokens))
            worst = max([worst, *(abs(a - b) for a, b in zip(mine[:same], theirs[:same], strict=True))])
        return worst

    def prompting(self, found: dict[str, Any]) -> float:
        """The largest difference of a prompt token's log-probability."""
        return max(
            abs(a - b)
            for mine, (_, _, theirs) in zip(found["prompt_logprobs"], self.expected, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
