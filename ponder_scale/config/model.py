"""The knobs of the architecture and of pondering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ponder_scale.errors import ConfigError
from ponder_scale.settings import knob

from .bounds import MOST_POSITIONS, MOST_VOCABULARY, MOST_WIDTH

INTERLEAVED = ("latent", "pause")  # kinds of feedback that add positions instead of passes over the same ones


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Names are those of transformers' configurations."""

    architecture: Literal["llama", "gpt_neox", "gpt2", "olmo2"] = knob("llama", "The transformer that ponders.")
    vocab_size: int | None = knob(
        None,
        "Size of the vocabulary. `null` takes the tokenizer's, from the shards.",
        unit="tokens",
        min=1,
        max=MOST_VOCABULARY,
    )
    hidden_size: int = knob(512, "Width D of the hidden states.", min=1, max=MOST_WIDTH)
    intermediate_size: int = knob(1408, "Width of the MLP.", min=1, max=4 * MOST_WIDTH)
    num_hidden_layers: int = knob(8, "Number of layers L. Every pass runs all of them.", min=1, max=4096)
    num_attention_heads: int = knob(8, "Number of attention heads.", min=1, max=2**14)
    num_key_value_heads: int | None = knob(
        None,
        "Number of key-value heads, for llama and olmo2. `null` uses one for each attention head.",
        min=1,
        max=2**14,
    )
    max_position_embeddings: int | None = knob(
        None,
        "Longest sequence the model accepts. `null` uses `data.seq_len`.",
        unit="tokens",
        min=1,
        max=MOST_POSITIONS,
    )
    rope_theta: float | None = knob(
        None, "Base of the rotary embedding. `null` uses 10000. GPT-2 has none.", min=1, max=1e12
    )
    norm_eps: float = knob(1e-5, "Epsilon of the norms.", min=1e-12, max=1)
    tie_word_embeddings: bool | None = knob(
        None, "Use the embedding table as the head. `null` follows the architecture."
    )
    pondering_steps: int = knob(
        3, "S: how often a pass feeds back to the next one. The model runs S + 1 passes.", min=0, max=64
    )
    scale_embeds: bool = knob(True, "Multiply embeddings by sqrt(hidden_size).")
    initial_scale: float = knob(
        1.0, "Factor on the input embeddings e_0. The published `mutiply_pondering_steps` uses S.", min=1e-6, max=1e6
    )
    pondering_temperature: float = knob(1.0, "Temperature tau of the pondering softmax.", min=1e-3, max=1e3)
    feedback: Literal["embedding", "hidden", "both", "latent", "pause"] = knob(
        "embedding",
        "What each pass feeds back to the next one (T). embedding: the pondering embedding. hidden: its hidden states. "
        "both: both, through a learned gate. latent and pause are other methods. They follow each token by S more "
        "positions. latent: the input of such a position is the hidden state of the position before (PonderLM-2). "
        "pause: the input is a learned embedding (pause tokens).",
    )
    residual: Literal["accumulate", "restart", "replace"] = knob(
        "accumulate",
        "How the input e_s of pass s is made from the feedback T. accumulate: e_{s-1} + T. restart: e_0 + T. replace: "
        "T alone.",
    )
    pondering_top_k: int | None = knob(
        None,
        "Build the pondering embedding from the k most probable tokens only. `null` uses the whole vocabulary.",
        unit="tokens",
        min=1,
        max=MOST_VOCABULARY,
    )
    halting: Literal["none", "gate", "exit"] = knob(
        "none",
        "Let each token stop pondering by learned gates. gate: tokens halt in training, too. exit: tokens halt only "
        "after training, and in training the gates weigh the losses of all passes.",
    )
    halting_threshold: float = knob(
        1e-4,
        "A token halts when its gate falls below this value (`halting=gate`), or when the product of its gates so far "
        "does (`halting=exit`). A higher value saves more.",
        min=0,
        max=1,
    )
    extra_heads: int = knob(
        0,
        "Multi-token prediction: heads that predict the tokens 2, 3, ... ahead, besides the next one. Each is one more "
        "layer. They draft tokens when the model generates, and else change nothing.",
        min=0,
        max=64,
    )
    init_by_passes: bool | None = knob(
        None,
        "Also divide the initial output projections by sqrt(S + 1). `null` does what the published code of the "
        "architecture does.",
    )
    init_from: str | None = knob(
        None, "Start a new run from the weights of this Hugging Face folder, pondering or not.", path=True
    )
    extra: dict[str, Any] = knob({}, "More fields for the configuration of transformers, under their own names.")

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size is {self.hidden_size}; expected a multiple of "
                f"model.num_attention_heads ({self.num_attention_heads})"
            )
