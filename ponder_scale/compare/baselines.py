"""The names of the baselines of a comparison, and what each changes in the recipe. Loads nothing, for the help text."""

from __future__ import annotations

import math

VANILLA = "vanilla"
TWICE = "vanilla-twice"
FLOPS = "vanilla-flops"
LONG, LONGER = "vanilla-long", 10
TIME = "vanilla-time"

FIXED = ("train.pondering.schedule=fixed", "train.pondering.mean=null", "train.pondering.per=step")
# What methods that add positions do not have, at its default.
POSITIONS = (
    *("model.residual=accumulate", "model.halting=none", "model.pondering_top_k=null", "model.pondering_temperature=1"),
    *("model.extra_heads=0", "train.pass_losses=last", "train.pondering.backward_passes=null", *FIXED),
)
PLAIN = ("model.pondering_steps=0", "model.initial_scale=1", *FIXED)
# Baselines that you can add by name. They take as many pondering steps as the first pondering model.
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    TIME: ("equal parameters and training time, so more tokens", PLAIN),
    LONG: (f"equal parameters, {LONGER} times the steps", PLAIN),
    "looped": (
        "a looped transformer: each pass gets the hidden states of the pass before",
        ("model.feedback=hidden", "model.residual=replace"),
    ),
    "hidden": ("hidden states are added to the input instead of pondering embeddings", ("model.feedback=hidden",)),
    "both": ("hidden states are fed back beside pondering embeddings, by a learned gate", ("model.feedback=both",)),
    "latent": (
        "the hidden state of each position is the input of one more (PonderLM-2)",
        ("model.feedback=latent", f"model.initial_scale={math.sqrt(2.5)}", *POSITIONS),
    ),
    "pause": (
        "each token is followed by learned embeddings (pause tokens)",
        ("model.feedback=pause", "model.initial_scale=1", *POSITIONS),
    ),
    "halting": ("pondering in which each token halts by a learned gate", ("model.halting=gate",)),
    "exits": (
        "pondering in which each token learns after which pass to stop, by its expected loss",
        ("model.halting=exit", "train.pass_losses=exit"),
    ),
    "multi-token": (
        "pondering that also learns to predict the two tokens after the next, by extra heads of one layer each",
        ("model.extra_heads=2",),
    ),
    "vanilla-multi-token": (
        "vanilla that also learns to predict the two tokens after the next (multi-token prediction)",
        (*PLAIN, "model.extra_heads=2"),
    ),
    "vanilla-unscaled": (
        "vanilla without the factor sqrt(D) on its embeddings",
        (
            "model.pondering_steps=0",
            "model.scale_embeds=false",
            "model.initial_scale=1",
            *FIXED,
        ),
    ),
}
