"""Compute the memory of a server of a pondering model: its weights once, and a key-value cache for each pass.

Layer i of pass s attends to its own keys and values, so a token takes this much of the cache:

    (S + 1) * L * 2 * key-value heads * head width * bytes of a number

That is S + 1 times what the stock model takes. Tensor parallelism divides weights and heads over the ranks. If there
are fewer key-value heads than ranks, several ranks have the same head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ponder_scale.errors import ConfigError
from ponder_scale.figures import count, size
from ponder_scale.planning.shape import model_shape

SERVED_SHARE = 0.92  # share of a device's memory that vLLM takes by default
WIDTH = 2  # bytes of a number; vLLM serves in bfloat16
SERVED = {"feedback": ("embedding", "hidden"), "halting": ("none",)}  # by the vLLM plugin, see `serve.limits`
BLOCK = 16  # vLLM gives cache to a request in blocks of this many tokens, on a GPU


@dataclass(frozen=True)
class Serving:
    """The bytes on one of `ranks` devices that share the model."""

    weights_bytes: int
    token_bytes: int
    passes: int
    ranks: int

    def tokens(self, memory_bytes: float) -> int:
        """The tokens that fit, over all requests. The memory of the forward itself is not counted. 0 if none fits."""
        return max(0, int(SERVED_SHARE * memory_bytes - self.weights_bytes) // self.token_bytes // BLOCK * BLOCK)


def token_bytes(configuration: Any, *, ranks: int = 1, width: int = WIDTH) -> int:
    """The bytes that one token takes of the cache of one device.

    Args:
        configuration: configuration of a pondering model.
        ranks: number of ranks in tensor parallelism.
        width: bytes of a number.
    """
    heads = getattr(configuration, "num_key_value_heads", None) or configuration.num_attention_heads
    head = getattr(configuration, "head_dim", None) or configuration.hidden_size // configuration.num_attention_heads
    slots = (configuration.pondering_steps + 1) * configuration.num_hidden_layers
    return slots * 2 * max(1, heads // ranks) * head * width


def plan_serving(configuration: Any, ranks: int) -> Serving:
    """The plan of a server of `ranks` devices that share one model.

    Extra heads for the tokens further ahead are not served, so they take no memory.

    Raises:
        ConfigError: heads do not divide over the devices, or the vLLM plugin does not serve such a model.
    """
    for field, served in SERVED.items():
        if (value := getattr(configuration, field)) not in served:
            raise ConfigError(
                f"model.{field} is {value}, which the vLLM plugin does not serve; expected {' or '.join(served)}, or "
                "leave --serve out"
            )
    heads = configuration.num_attention_heads
    if heads % ranks:
        raise ConfigError(f"--serve is {ranks}; expected a number of devices that divides the {heads} attention heads")
    shape = model_shape(configuration, 1)
    parameters = shape.parameters - shape.head_parameters
    return Serving(
        weights_bytes=-(-parameters * WIDTH // ranks),
        token_bytes=token_bytes(configuration, ranks=ranks),
        passes=configuration.pondering_steps + 1,
        ranks=ranks,
    )


def report(serving: Serving, sequence: int, *, device: str, memory_bytes: float) -> list[str]:
    """The lines of `ponder-scale plan --serve`. Requests are counted as `sequence` tokens each."""
    room = serving.tokens(memory_bytes)
    on = device if serving.ranks == 1 else f"each of {serving.ranks} x {device}"
    lines = [
        f"serving        {size(serving.weights_bytes)} of weights in bf16, once for {serving.passes} passes, and "
        f"{size(serving.token_bytes)} of key-value cache a token, {serving.passes} x the stock model's",
        f"room           {count(room)} tokens on {on} ({SERVED_SHARE:.0%} of {size(memory_bytes)}): "
        f"{room // sequence:,} requests of {sequence:,} tokens at a time",
    ]
    if room < sequence:
        lines.append(
            f"warning: not one request of {sequence:,} tokens fits; serve on more devices (--serve N), shorter "
            "requests (--max-model-len), or with fewer pondering steps"
        )
    return lines
