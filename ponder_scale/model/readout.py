"""The head and the embedding table of a model, as its passes use them.

The pondering embedding and the loss need the weights of both, (V, D) each. The weights of a plain `nn.Linear` and
`nn.Embedding` go to the ops of `pondering_embedding.py`. Other modules compute something that their `weight` does not
show, because of an adapter, quantization, a hook, or weights that wait on a disk. Then the module itself is called for
one block of tokens at a time, and backward calls it again.

N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backends import (
    Statistics,
    chunk,
    is_fake,
    label_loss,
    total_loss,
    wide,
    wide_product,
    width,
)
from .operators import check_labels
from .pondering_embedding import cross_entropy, is_decoded, mixture, pondering_embedding, row_logits

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Hooks that do not change what a module computes. ZeRO's hooks bring its weights. Those of transformers and PEFT let
# gradients reach the inputs of a frozen model.
HARMLESS_MODULES = ("deepspeed.",)
HARMLESS_NAMES = ("make_inputs_require_grad",)


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module computes exactly what its weight says: it is of this class, and nothing is attached to it."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if any(not _is_harmless(hook) for name in HOOKS for hook in getattr(module, name).values()):
        return False
    if isinstance(module, nn.Linear) and module.bias is not None:
        return False
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return False
    weight: Any = module.weight
    return _is_plain_tensor(weight)


def _is_harmless(hook: Any) -> bool:
    function = getattr(hook, "func", hook)
    name = getattr(function, "__qualname__", "").rpartition(".")[2]
    return getattr(function, "__module__", "").startswith(HARMLESS_MODULES) or name.startswith(HARMLESS_NAMES)


def _is_plain_tensor(weight: Tensor) -> bool:
    # quantized, distributed and other special tensors have classes of their own
    usual = type(weight) in (nn.Parameter, Tensor) or is_fake(weight)
    return usual and weight.is_floating_point() and weight.device.type != "meta"


class Ops(NamedTuple):
    """Functions on the weights of a plain head and table, (V, D) each, which keep no (N, V) in memory."""

    pondering_embedding: Callable[..., tuple[Tensor, Statistics | None]] = pondering_embedding
    cross_entropy: Callable[..., tuple[Tensor, Statistics]] = cross_entropy


class Readout:
    """The head and the table of one forward.

    Args:
        model: a `...ForCausalLM` of transformers with the pondering fields in its configuration.
        ops: replaces the functions of `pondering_embedding.py`.
    """

    def __init__(self, model: Any, ops: Ops | None = None) -> None:
        self._config, self._ops = model.config, ops or Ops()
        self._head, self._table = model.get_output_embeddings(), model.get_input_embeddings()
        self._plain_head, self._plain_table = is_plain(self._head, nn.Linear), is_plain(self._table, nn.Embedding)
        self._rows: Tensor | None = None
        self._known: tuple[Tensor, Tensor] | None = None
        self.scale = math.sqrt(self._config.hidden_size) if self._config.scale_embeds else 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (..., V) of hidden states (..., D)."""
        if self._plain_head:
            return nn.functional.linear(hidden, self._head.weight.to(hidden.dtype))
        return _present(self._head(hidden), "head", self._head)

    def kept_logits(self, hidden: Tensor) -> Tensor:
        """The logits (N, V) of a few hidden states (..., D), in the dtype of sums.

        They are kept for `pondering_embedding` and `last_logits` of the same tensor, which then need no product.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = self._decoded_logits(flat)
        if rows is not None:
            logits = rows
        elif self._plain_head and not torch.is_grad_enabled():
            head = self._head.weight
            logits = wide_product(flat, head.t(), flat.new_empty(len(flat), len(head), dtype=width(flat)))
        else:
            logits = wide(self._logits_over(flat, self._config.vocab_size))
        self._known = hidden, logits
        return logits

    def last_logits(self, hidden: Tensor, kept: int | Tensor) -> Tensor:
        """The logits (B, n, V) of hidden states (B, T, D): of the last `kept` (0 for all), or of the indices in it."""
        chosen = slice(-kept, None) if isinstance(kept, int) else kept
        if (known := self._kept(hidden)) is not None:
            return known.view(*hidden.shape[:-1], -1)[:, chosen].to(hidden.dtype)
        hidden = hidden[:, chosen]
        rows = self._decoded_logits(hidden.reshape(-1, hidden.shape[-1]))
        logits: Tensor = self._head(hidden) if rows is None else rows.view(*hidden.shape[:-1], -1)
        return logits

    def _decoded_logits(self, flat: Tensor) -> Tensor | None:
        """The logits of a few decoded tokens (n, D), where `row_logits` computes what the head does."""
        if not self._plain_head or not is_decoded(flat) or self._head.weight.dtype != flat.dtype:
            return None
        return row_logits(flat, self._head.weight)

    def _kept(self, hidden: Tensor) -> Tensor | None:
        return self._known[1] if self._known is not None and self._known[0] is hidden else None

    def pondering_embedding(
        self, hidden: Tensor, labels: Tensor | None, *, learn: bool = False
    ) -> tuple[Tensor, Statistics | None]:
        """Like `pondering_embedding.pondering_embedding`, with the model's own settings."""
        options: dict[str, Any] = {
            "temperature": self._config.pondering_temperature,
            "scale": self.scale,
            "top_k": self._config.pondering_top_k,
        }
        known = self._kept(hidden)
        if known is not None and labels is None:
            rows = self._table_rows(hidden)
            return mixture(known.to(rows.device), rows, None, **options)[0].view(hidden.shape).to(hidden), None
        options |= {"learn": True} if learn else {}  # left out when False, so that other ops need not know it
        return self._mixture(hidden, labels, options)

    def _mixture(
        self, hidden: Tensor, labels: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Statistics | None]:
        if self._plain_head:
            weights = self._head.weight, self._table_rows(hidden)
            return self._ops.pondering_embedding(hidden, *weights, labels=labels, **options)
        rows = self._table_rows(hidden)
        check_labels(labels, rows.shape[0])

        def block(part: Tensor, targets: Tensor | None) -> tuple[Tensor, ...]:
            logits = self._logits_over(part, rows.shape[0]).to(rows.device)
            return mixture(logits, rows, targets, **options)

        mixed, loss, entropy = _in_blocks(block, hidden, labels, rows.shape[0])
        mixed = mixed.view(hidden.shape).to(hidden)
        return mixed, None if labels is None else Statistics(loss, entropy)

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Statistics:
        """The statistics of each token's prediction, whose losses are differentiable; `cross_entropy` has the sum's.

        By the op of the pondering embedding, at temperature 1 over the whole vocabulary: four products more.
        """
        options: dict[str, Any] = {"temperature": 1.0, "scale": 1.0, "top_k": None, "learn": torch.is_grad_enabled()}
        seen = self._mixture(hidden, labels, options)[1]
        assert seen is not None
        return seen

    def cross_entropy(self, hidden: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Statistics]:
        """Like `pondering_embedding.cross_entropy`."""
        if self._plain_head:
            return self._ops.cross_entropy(hidden, self._head.weight, labels, z_loss=z_loss)

        def block(part: Tensor, targets: Tensor | None) -> tuple[Tensor, ...]:
            assert targets is not None
            logits = wide(self._logits_over(part, self._config.vocab_size)).to(targets.device)
            lse = logits.logsumexp(-1)
            loss = label_loss(logits, targets, lse)
            total = total_loss(loss, lse.square(), targets, z_loss)
            with torch.no_grad():
                p = logits.softmax(-1)
                entropy = -torch.special.xlogy(p, p).sum(-1)
            return total.view(1), loss.detach(), entropy

        check_labels(labels, self._config.vocab_size)
        totals, loss, entropy = _in_blocks(block, hidden, labels, self._config.vocab_size)
        return totals.sum(), Statistics(loss, entropy)

    def _table_rows(self, hidden: Tensor) -> Tensor:
        """The row of the table for each token of the vocabulary, (V, D)."""
        if self._plain_table:
            return self._table.weight
        if self._rows is None:  # once for all passes
            tokens = torch.arange(self._config.vocab_size, device=hidden.device)
            self._rows = _present(self._table(tokens), "embedding table", self._table).to(hidden)
        return self._rows

    def _logits_over(self, hidden: Tensor, vocabulary: int) -> Tensor:
        logits = self.logits(hidden)
        if logits.shape[-1] != vocabulary:
            raise ValueError(
                f"the head ({type(self._head).__name__}) gives {logits.shape[-1]} logits for a vocabulary of "
                f"{vocabulary} tokens; pondering needs one for each row of the embedding table"
            )
        return logits


def _present(result: Tensor, name: str, module: Any) -> Tensor:
    if not isinstance(result, Tensor) or result.device.type == "meta":
        found = "a tensor without data (meta)" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise ValueError(
            f"the {name} ({type(module).__name__}) gives {found}; load its weights, or let the tool that "
            "offloaded them load them when the module is called"
        )
    return result


def _in_blocks(
    function: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
    hidden: Tensor,
    labels: Tensor | None,
    vocabulary: int,
) -> tuple[Tensor, ...]:
    """Apply a function of hidden states (n, D) and labels (n,) to blocks of all N tokens, and concatenate the results.

    Backward computes each block again, so nothing of size (N, V) is kept.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets = None if labels is None else labels.reshape(-1)
    rows = chunk(flat, flat.shape[0], vocabulary)
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, max(1, flat.shape[0]), rows):
        part = flat[start : start + rows], None if targets is None else targets[start : start + rows]
        if torch.is_grad_enabled():
            found.append(checkpoint(function, *part, use_reentrant=False))
        else:
            found.append(function(*part))
    return tuple(torch.cat(some) for some in zip(*found, strict=True))
