"""Learned halting: each token stops to ponder when its own gate says so.

Each pondering step s = 1..S has a gate g_s = sigmoid(MLP_s(h_{s-1})). With r_0 = m_0 = 1:

    "gate"   r_s = m_{s-1} g_s                     T_s is weighted by m_s g_s before it enters e_s
    "exit"   r_s = r_{s-1} g_s                     T_s enters e_s as it is; in training all m_s are 1
    m_s = [r_s >= threshold]                       a token that has halted never continues: its r stays below
    h_s, and the keys and values of each layer in pass s, are those of pass s - 1 where m_s = 0

Later tokens read what a token left when it halted. So a cache that was filled token by token holds the same as a
forward over the whole text.

"gate" is AdaPonderLM's (arXiv 2603.01914), whose loss is the mean of the smallest gates, see `smallest_gates`. "exit"
is Ouro's (arXiv 2510.25741): p_s = r_s - r_{s+1} is the probability that pass s is the last, and the loss is the
expected one, see `expected_loss`. Its rule, to stop once the probabilities add up to q, is a threshold of 1 - q. We
know the equations of both from notes of third parties. The width of the MLP (D / 4), one MLP for each step, and the
first bias are ours.

B batch, T tokens, D hidden size, S pondering steps, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .backends import is_fake, wide
from .cache import PassView, copy_newest
from .gate import fill_unless_loaded
from .ponder import Feedback

BY_ROW = ("attention_mask", "position_ids")  # arguments of a backbone that have a row for each row of the batch
OPEN = 4.0  # the bias of a new gate: sigmoid(4) = 0.98, so that training starts near the plain method


class HaltingGates(nn.ModuleList):
    """A gate for each of S pondering steps. One gate for all of them collapses, says the source."""

    def __init__(self, hidden_size: int, pondering_steps: int) -> None:
        super().__init__(Gate(hidden_size) for _ in range(pondering_steps))

    def of(self, hidden: Tensor, index: int) -> Tensor:
        """g, (B, T), of hidden states (B, T, D) of pass `index`. Passes beyond S use the last gate."""
        return self[min(index, len(self) - 1)](hidden)


class Gate(nn.Module):
    """g = sigmoid(w . silu(W h) + b)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, max(1, hidden_size // 4), bias=False)
        self.down = Opening(self.up.out_features, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """g, (...,), at least fp32, of hidden states (..., D)."""
        return wide(self.down(nn.functional.silu(self.up(hidden))).squeeze(-1)).sigmoid()


class Opening(nn.Linear):
    """The last layer of a gate."""

    def start(self) -> None:
        """Give every token the same g, unless the weights were loaded."""
        fill_unless_loaded(self.weight, 0.0)
        fill_unless_loaded(self.bias, OPEN)


class KeptView(PassView):
    """What a pass sees of the cache when halted tokens keep the keys and values of the pass before.

    Backward may run the pass again, when the cache is full already. So its length is that of the beginning, and once
    the pass has run, nothing more is written.

    Args:
        active: m of this pass, (B, T); None for the first.
        hidden: h of the pass before, (B, T, D).
        rows: the rows that the pass runs, (n,), because all tokens of the others have halted; None for all.
    """

    def __init__(
        self,
        cache: Cache,
        index: int,
        layers: int,
        active: Tensor | None = None,
        hidden: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__(cache, index, layers)
        self._active, self._hidden, self._rows = active, hidden, rows
        self._begin, self._closed = int(cache.get_seq_length(index * layers)), False

    def of_rows(self, embeds: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The embeddings (n, T, D) of the rows that the pass runs, and the options of the backbone for them."""
        if self._rows is None:
            return embeds, dict(options)
        batch = embeds.shape[0]
        chosen = {
            name: value[self._rows] if name in BY_ROW and isinstance(value, Tensor) and len(value) == batch else value
            for name, value in options.items()
        }
        return embeds[self._rows], chosen

    def keep(self, hidden: Tensor) -> Tensor:
        """The hidden states (B, T, D) that the pass leaves, given those that it has made. It ends here."""
        self._closed = True
        if self._active is None or self._hidden is None:
            return hidden
        return self._merged(self._active.unsqueeze(-1), hidden, self._hidden)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The keys and values of a layer with the new ones appended, (B, heads, T, head width) each."""
        if self._active is not None:
            before = self._cache.layers[self._first - self._layers + layer_idx]
            active = self._active[:, None, :, None]
            keys = self._merged(active, keys, self._new_part(before.keys, keys))
            values = self._merged(active, values, self._new_part(before.values, values))
        if not self._closed:
            every = super().update(keys, values, layer_idx, *args, **kwargs)
            return every if self._rows is None else tuple(each[self._rows] for each in every)
        if self._begin == 0:
            return keys, values
        own = self._cache.layers[self._first + layer_idx]
        pairs = ((own.keys, keys), (own.values, values))
        return tuple(torch.cat([old[..., : self._begin, :], new], -2) for old, new in pairs)

    def _merged(self, active: Tensor, new: Tensor, before: Tensor) -> Tensor:
        """What the pass made, (n, ...), where tokens are active, and what the pass before left elsewhere, (B, ...)."""
        if self._rows is None:
            return torch.where(active, new, before)
        merged = before.clone()
        merged[self._rows] = torch.where(active[self._rows], new, before[self._rows])
        return merged

    def _new_part(self, cached: Tensor, new: Tensor) -> Tensor:
        return cached[..., self._begin : self._begin + new.shape[-2], :]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens that were cached when the pass began."""
        return self._begin

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the first new token."""
        return self._begin

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys, for the attention mask."""
        return self._begin + query_length, 0


class Halting:
    """The halting of one forward: which tokens are active, and what the others keep.

    Args:
        config: of the model.
        steps: pondering steps of this forward.
        cache: of all passes; see `KeptView`. None where no token halts: in the training of "exit".
        may_stop: leave out a row once all of its tokens have halted, and end the forward when no row is left. The
            caches of what is left out get a copy.

    Attributes:
        halts: whether tokens halt in this forward.
        remaining: r of each pondering step, (B, T) each, with gradient.
        active: m of each pass, (B, T) each.
    """

    def __init__(
        self, modules: HaltingGates, config: Any, steps: int, cache: Cache | None, layers: int, *, may_stop: bool
    ) -> None:
        self._modules, self._threshold, self._steps = modules, config.halting_threshold, steps
        self._cache, self._layers, self._may_stop = cache, layers, may_stop
        self._hidden: Tensor | None = None
        self._rows: Tensor | None = None
        self.by_exit, self.halts = config.halting == "exit", cache is not None
        self.remaining: list[Tensor] = []
        self.active: list[Tensor] = []

    def view(self, index: int) -> KeptView | None:
        """The view of pass `index`, which is about to run."""
        if self._cache is None:
            return None
        return KeptView(self._cache, index, self._layers, self.active[-1] if index else None, self._hidden, self._rows)

    def decide(self, hidden: Tensor, index: int) -> bool:
        """Let the tokens of pass `index` continue or halt. Returns whether the forward ends here."""
        self._hidden = hidden
        if index == 0:
            self.active.append(torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device))
        gate = self._modules.of(hidden, index)
        if not self.by_exit:
            left = torch.where(self.active[-1], gate, 0.0)
        else:
            left = self.remaining[-1] * gate if self.remaining else gate
        self.remaining.append(left)
        self.active.append(self.active[-1] if self._cache is None else left >= self._threshold)
        if self._cache is None or not self._may_stop:
            return False
        alive = self.active[-1].any(-1).nonzero().squeeze(-1)
        self._rows = alive if len(alive) < len(hidden) else None
        if len(alive):
            return False
        copy_newest(self._cache, hidden.shape[1], index, self._steps + 1, self._layers)
        return True

    def weighting(self, feedback: Feedback) -> Feedback:
        """A feedback that gives m g T, (B, T, D); of "exit" T alone. It is 0 in rows that the next pass leaves out."""

        def of_rows(hidden: Tensor, index: int) -> Tensor:
            if self._rows is None:
                return feedback(hidden, index)
            fed_back = torch.zeros_like(hidden)
            fed_back[self._rows] = feedback(hidden[self._rows], index)
            return fed_back

        def weighted(hidden: Tensor, index: int) -> Tensor:
            fed_back = of_rows(hidden, index)
            weight = torch.where(self.active[-1], self.remaining[-1], 0.0)
            return fed_back * weight.unsqueeze(-1).to(fed_back.dtype)

        return of_rows if self.by_exit else weighted


def touch(gates: Iterable[Gate], embeds: Tensor) -> Tensor:
    """The embeddings (B, T, D), through which gates that a forward does not use get a gradient of 0.

    A weight that a step does not use keeps the gradient of the step before under ZeRO-3.
    """
    for gate in gates:
        embeds = embeds + 0.0 * gate(embeds[:, :1].detach()).mean().to(embeds.dtype)
    return embeds


def smallest_gates(gates: Sequence[Tensor], counted: Tensor, share: float) -> Tensor:
    """The mean of the smallest `share` of m_{s-1} g_s over the tokens that count and over all pondering steps.

    Gates of halted tokens are 0 and among the smallest, so the mean is 0 once this share of the computation is saved.

    Args:
        gates: (B, T) for each pondering step.
        counted: (B, T), which tokens have a label that counts.
    """
    values = torch.stack(list(gates)).masked_fill(~counted, torch.inf).flatten()
    ordered = values.sort().values
    number = (share * counted.sum() * len(gates)).floor()
    chosen = torch.arange(len(ordered), device=ordered.device) < number  # no count on the host, for which it would wait
    return torch.where(chosen, ordered, 0.0).sum() / number.clamp(min=1)


def expected_loss(
    losses: Sequence[Tensor], remaining: Sequence[Tensor], counted: Tensor, entropy_weight: float
) -> Tensor:
    """sum_s p_s CE_s - entropy_weight * H(p), summed over the tokens that count, with p_s = r_s - r_{s+1}.

    The entropy keeps the gates from settling on one pass before they know better.

    Args:
        losses: of each of the S + 1 passes, (N,), 0 where there is no label.
        remaining: r of each pondering step, (N,).
        counted: (N,), which tokens have a label that counts.
    """
    one, none = torch.ones_like(remaining[0]), torch.zeros_like(remaining[0])
    p = torch.stack([one, *remaining]) - torch.stack([*remaining, none])  # (S + 1, N)
    expected = (p * torch.stack(list(losses))).sum()
    log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()  # p is 0 where a gate is 1 to its last bit
    return expected + entropy_weight * (p * log_p * counted).sum()


def packing_mask(position_ids: Tensor | None, embeds: Tensor, config: Any, each: int = 1) -> Tensor | None:
    """The attention mask (B, 1, N, N) of rows that hold several documents; None where no row does.

    transformers makes it from positions that start again, but only without a cache.

    Args:
        position_ids: (B, T) or (1, T), from 0 in each document.
        embeds: its batch, dtype and device are those of the mask.
        each: positions of each token, N = each * T.

    Raises:
        ValueError: a row holds several documents, and this attention takes no such mask.
    """
    attention = config._attn_implementation
    if position_ids is None or attention.startswith("flash"):  # flash attention reads the positions itself
        return None
    starts = nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    if not is_fake(starts) and not starts.any():
        return None
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"attention is {attention!r}, which cannot separate the documents of a row beside learned halting; use "
            "'sdpa', 'eager' or flash attention"
        )
    document = starts.cumsum(-1).repeat_interleave(each, -1)
    length = document.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
    seen = (document[:, None, :, None] == document[:, None, None, :]) & causal
    seen = seen.expand(embeds.shape[0], 1, length, length)
    if attention != "eager":
        return seen
    return torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(embeds.dtype).min)


def halts_nothing(model: Any) -> bool:
    """Whether every token runs every pass, because "exit" is being trained."""
    return model.config.halting == "exit" and model.training


def refuse_with_halting(
    backbone: Any, exit_kl: float | None, sequence_steps: Any, backward_passes: int | None, options: Mapping[str, Any]
) -> None:
    """Raise ValueError for what would be wrong beside halting."""
    for name, value in (
        ("exit_kl", exit_kl),
        ("sequence_steps", sequence_steps),
        ("backward_passes", backward_passes),
    ):
        if value is not None:
            raise ValueError(f"{name} with learned halting: each decides how deep a token goes; leave {name} out")
    if halts_nothing(backbone):
        return
    for name in ("output_hidden_states", "output_attentions"):
        if options.get(name) or (options.get(name) is None and getattr(backbone.config, name, False)):
            raise ValueError(f"{name} would show states that halted tokens do not keep; leave it out with halting")
    if torch.is_grad_enabled() and any(getattr(part, "gradient_checkpointing", False) for part in backbone.modules()):
        raise ValueError(
            "gradient checkpointing of transformers drops the keys and values that halted tokens keep; call "
            "gradient_checkpointing_disable(), and use train.recompute in a run"
        )


def check_halting_loss(
    halting_loss: tuple[float, float] | None, halting: str, z_loss: float, pass_weights: Sequence[float] | None
) -> None:
    """Raise ValueError if the gates cannot learn by this loss, or not beside the others."""
    if halting_loss is None:
        return
    if halting == "none":
        raise ValueError("halting_loss needs a model with halting 'gate' or 'exit'; this one has none")
    if halting == "exit" and (z_loss or pass_weights is not None):
        raise ValueError("halting 'exit' weighs the losses of the passes itself; leave out z_loss and pass_weights")
