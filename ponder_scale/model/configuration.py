"""Configurations of pondering models: the stock configuration of transformers plus `PonderingFields`."""

from __future__ import annotations

import math
from typing import Any

from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Olmo2Config

RESIDUALS = ("accumulate", "restart", "replace")
INTERLEAVED = ("latent", "pause")  # see interleaved.py
FEEDBACKS = ("embedding", "hidden", "both", *INTERLEAVED)
HALTINGS = ("none", "gate", "exit")
PONDERING_FIELDS = (
    *("pondering_steps", "scale_embeds", "initial_scale", "pondering_temperature", "feedback", "residual"),
    *("pondering_top_k", "init_by_passes", "halting", "halting_threshold"),
    "extra_heads",
)


class PonderingFields:
    """The pondering fields, as a mixin before a configuration of transformers.

    The defaults are neutral. With `pondering_steps=0` and the other defaults, the model is the stock model.

    Args:
        pondering_steps: S, how often the pondering embedding is fed back; the backbone runs S + 1 times.
        scale_embeds: multiply token and pondering embeddings by sqrt(hidden_size).
        initial_scale: factor on e_0. The published `mutiply_pondering_steps` is `initial_scale=S`.
        pondering_temperature: tau, divides the logits of the pondering softmax.
        feedback: T, what a pass passes on to the next: its pondering "embedding", or its "hidden" states after the last
            norm. "hidden" with the residual "replace" is a looped transformer. "both" adds the hidden states to the
            pondering embedding through a learned gate, see `gate.py`. "latent" and "pause" are other methods, which
            follow each token by S more positions, see `interleaved.py`.
        residual: "accumulate" feeds e_{s-1} + T, "restart" feeds e_0 + T, "replace" feeds T.
        pondering_top_k: use only the K most probable tokens, renormalised. None uses the whole vocabulary.
        init_by_passes: also divide the initial output projections by sqrt(S + 1). None does what the published code of
            the architecture does: GPT-NeoX divides, the others do not.
        halting: "gate" and "exit" let each token stop pondering by learned gates, see `halting.py`; "none" ponders S
            steps.
        halting_threshold: a token halts when what its gates leave is below this. A higher one saves more, after
            training too.
        extra_heads: further heads, which predict the tokens 2, 3, ... ahead, see `multi_token.py`. They change neither
            the logits nor the next token.

    Raises:
        ValueError: a field is out of its range, or fields exclude each other.
    """

    published_init_by_passes = False
    # Fewest and most refinements that the published code of "latent" draws for a training step.
    published_refinements = (2, 3)

    def __init__(
        self,
        pondering_steps: int = 3,
        scale_embeds: bool = False,
        initial_scale: float = 1.0,
        pondering_temperature: float = 1.0,
        feedback: str = "embedding",
        residual: str = "accumulate",
        pondering_top_k: int | None = None,
        init_by_passes: bool | None = None,
        halting: str = "none",
        halting_threshold: float = 1e-4,
        extra_heads: int = 0,
        **kwargs: Any,
    ) -> None:
        self.pondering_steps = pondering_steps
        self.scale_embeds = scale_embeds
        self.initial_scale = initial_scale
        self.pondering_temperature = pondering_temperature
        self.feedback = feedback
        self.residual = residual
        self.pondering_top_k = pondering_top_k
        self.init_by_passes = self.published_init_by_passes if init_by_passes is None else init_by_passes
        self.halting = halting
        self.halting_threshold = halting_threshold
        self.extra_heads = extra_heads
        self.check_pondering()
        if kwargs.get("dtype") is not None:
            kwargs.pop("torch_dtype", None)  # it is also written, for older readers
        super().__init__(**kwargs)

    def check_pondering(self) -> None:
        """Raise ValueError for a field that is out of its range. Every forward calls this again."""
        if not _is_integer(self.pondering_steps, 0):
            raise ValueError(f"pondering_steps is {self.pondering_steps!r}; expected an integer of at least 0")
        for field in ("pondering_temperature", "initial_scale"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{field} is {value!r}; expected a finite number of more than 0")
        for field in ("scale_embeds", "init_by_passes"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected True or False")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual is {self.residual!r}; expected one of {', '.join(RESIDUALS)}")
        if self.feedback not in FEEDBACKS:
            raise ValueError(f"feedback is {self.feedback!r}; expected one of {', '.join(FEEDBACKS)}")
        if self.halting not in HALTINGS:
            raise ValueError(f"halting is {self.halting!r}; expected one of {', '.join(HALTINGS)}")
        threshold = self.halting_threshold
        if not isinstance(threshold, (int, float)) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise ValueError(f"halting_threshold is {threshold!r}; expected a number from 0 to 1")
        if not _is_integer(self.extra_heads, 0):
            raise ValueError(f"extra_heads is {self.extra_heads!r}; expected an integer of at least 0")
        if self.extra_heads and self.halting != "none":
            raise ValueError(
                f"extra_heads is {self.extra_heads} with halting {self.halting!r}: the heads read the last pass, in "
                "which halted tokens have no state of their own; set extra_heads to 0 or halting to 'none'"
            )
        softmax = self.feedback not in ("hidden", *INTERLEAVED)
        if not softmax and (self.pondering_top_k is not None or self.pondering_temperature != 1.0):
            raise ValueError(
                f"pondering_top_k and pondering_temperature belong to the pondering softmax, which feedback "
                f"{self.feedback!r} does not use; leave them at their defaults"
            )
        if self.feedback in INTERLEAVED:
            for field, default in (("residual", "accumulate"), ("halting", "none"), ("extra_heads", 0)):
                if getattr(self, field) != default:
                    raise ValueError(
                        f"{field} is {getattr(self, field)!r} with feedback {self.feedback!r}, which adds positions "
                        f"and repeats none; leave {field} at {default!r}"
                    )
        if self.pondering_top_k is not None and not _is_integer(self.pondering_top_k, 1):
            raise ValueError(f"pondering_top_k is {self.pondering_top_k!r}; expected an integer of at least 1, or None")

    def to_dict(self) -> dict[str, Any]:
        """The stock dictionary, with the keys that transformers 4 reads under other names.

        Without them it silently uses its defaults: base 10000, and for GPT-NeoX a quarter of each head.
        """
        values = super().to_dict()  # type: ignore[misc]
        rope = values.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
            if "partial_rotary_factor" in rope:
                values |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The contents of config.json: `to_dict` without defaults, and the dtype as named before transformers 4.56."""
        # Not in `to_dict`, because transformers would look this key up at each load and warn that it is old.
        values = super().to_diff_dict()  # type: ignore[misc]
        if values.get("dtype") is not None:
            values["torch_dtype"] = values["dtype"]
        return values


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# Each class has its own `model_type`. With the stock one, a loader that does not trust remote code would build a model
# that never ponders. Each defines `__init__`, because transformers 5 generates one for a configuration that has none.


class PonderLlamaConfig(PonderingFields, LlamaConfig):
    """`LlamaConfig` with the pondering fields."""

    model_type = "ponder_llama"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class PonderGPTNeoXConfig(PonderingFields, GPTNeoXConfig):
    """`GPTNeoXConfig` (Pythia) with the pondering fields."""

    model_type = "ponder_gpt_neox"
    published_init_by_passes = True
    published_refinements = (2, 4)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class PonderGPT2Config(PonderingFields, GPT2Config):
    """`GPT2Config` with the pondering fields."""

    model_type = "ponder_gpt2"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class PonderOlmo2Config(PonderingFields, Olmo2Config):
    """`Olmo2Config` with the pondering fields."""

    model_type = "ponder_olmo2"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
