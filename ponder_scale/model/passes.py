"""The S + 1 passes of one forward: the recurrence, with the caches that it reads and what it leaves behind.

B batch, T tokens, D hidden size, L layers, S pondering steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .backends import Statistics
from .cache import PassView, check_growing, copy_newest, grow
from .changes import ChangeTracker, PassChanges
from .halting import Halting, halts_nothing, packing_mask, touch
from .ponder import Feedback, RunPass, ponder
from .readout import Ops, Readout


class Watch:
    """Records the statistics, losses and changes of the passes of one forward.

    It is a plain class, because code that moves tensors to devices leaves plain classes alone.

    Args:
        causal: the model whose head and configuration are used.
        targets: next tokens (B, T), -100 where there is none. If given, the statistics of each pass are computed.
        track: number of tokens on which to measure what each pass changes.
        ops: see `Readout`.
        weights: weights of the losses of the S + 1 passes. None means 1 for the last and 0 for the others.

    Attributes:
        statistics: those of the pondering softmax of each pass except the last.
        learned: the weighted sums of the losses of the passes that have a weight, except the last pass.
        halting: which tokens are active in each pass, where the model has gates and ponders.
        exits: whether the expected loss over the exits is learned, which needs differentiable losses of each token.
        token_losses: these, of each pass but the last, (N,).
        heads: whether the extra heads run beside the last pass.
        ahead: their hidden states, (n, B, T, D).
    """

    halting: Halting | None = None
    exits = heads = False
    ahead: Tensor | None = None

    def __init__(
        self,
        causal: Any,
        targets: Tensor | None = None,
        track: int | None = None,
        ops: Ops | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.causal, self.targets, self.weights = causal, targets, weights
        self.learned: list[Tensor] = []
        self.token_losses: list[Tensor] = []
        self.readout = Readout(causal, ops)
        self.tracker = None if track is None else ChangeTracker(track)
        self.statistics: list[Statistics | None] = []

    def check_weights(self, steps: int, first_differentiated: int) -> None:
        """Raise ValueError if the weights are for another number of pondering steps, or if some would train nothing."""
        if self.weights is None:
            return
        if len(self.weights) != steps + 1:
            raise ValueError(
                f"pass_weights has {len(self.weights)} weights; expected one for each of {steps + 1} passes"
            )
        if not all(weight >= 0 for weight in self.weights) or self.weights[-1] == 0:
            raise ValueError(
                f"pass_weights is {list(self.weights)}; expected at least 0 for each pass and more for the last; "
                "instead of last passes without weight, use fewer pondering_steps"
            )
        if any(self.weights[:first_differentiated]):
            raise ValueError(
                f"pass_weights is {list(self.weights)} with backward_passes, so the losses of the first "
                f"{first_differentiated} passes would have no gradient; give these passes the weight 0"
            )

    def feedback(self, hidden: Tensor, index: int) -> Tensor:
        """The feedback of pass `index`, from its hidden states (B, T, D). Records its statistics and its loss."""
        targets = self.targets
        weight = 0.0 if self.weights is None or targets is None else self.weights[index]
        learn, total = (weight > 0 or self.exits) and torch.is_grad_enabled(), None
        if self.causal.config.feedback == "hidden":
            fed_back, seen = hidden, None
            if targets is not None and self.exits:
                seen = self.readout.token_losses(hidden, targets)
            elif targets is not None:  # they cost a product, because this feedback has none
                with nullcontext() if learn else torch.no_grad():
                    total, seen = self.readout.cross_entropy(hidden, targets)
        else:
            fed_back, seen = self.readout.pondering_embedding(hidden, targets, learn=learn)
            if self.causal.config.feedback == "both":
                fed_back = self.causal.hidden_gate(fed_back, hidden)
        self.statistics.append(seen)
        if weight > 0 and seen is not None:
            self.learned.append(weight * (seen.loss.sum() if total is None else total))
        if self.exits and seen is not None:
            self.token_losses.append(seen.loss)
        return fed_back

    def changes(self) -> PassChanges | None:
        """What each pass changed. None if `track` was not given."""
        return None if self.tracker is None else self.tracker.changes(self.readout.logits)


class Passes:
    """The passes of one forward: the recurrence and the caches that it reads and fills."""

    def __init__(
        self,
        watch: Watch,
        steps: int | None,
        cache: Cache | None,
        exit_kl: float | None,
        backward_passes: int | None = None,
    ) -> None:
        self.watch, self.model, self.config = watch, watch.causal, watch.causal.config
        self.config.check_pondering()
        self.steps = self.config.pondering_steps if steps is None else checked_steps(steps)
        self.first_differentiated = 0 if backward_passes is None else max(0, self.steps + 1 - backward_passes)
        watch.check_weights(self.steps, self.first_differentiated)
        self.cache, self.own_cache, self.exit_kl = cache, False, exit_kl
        self.layers = self.model.num_layers
        self.gate = getattr(self.model, "hidden_gate", None)
        if self.config.feedback == "both" and self.steps > 0 and self.gate is None:
            raise ValueError(
                "feedback is 'both', but this model was made without a gate; set feedback and pondering_steps when you "
                "create or load the model"
            )
        self.gates = getattr(self.model, "halting_gates", None)
        self.output: Any = None
        if exit_kl is not None:
            check_growing(cache, "exit_kl")
        self.halting = self._begin_halting() if self.config.halting != "none" and self.steps > 0 else None
        if self.cache is not None:
            grow(self.cache, self.steps + 1, self.layers, len(self.model.extra_heads) if self.watch.heads else 0)

    def _begin_halting(self) -> Halting:
        if self.gates is None:
            raise ValueError(
                f"halting is {self.config.halting!r}, but this model was made without gates; set it, and "
                "pondering_steps, when you make or load the model"
            )
        if not halts_nothing(self.model):
            if self.cache is None:
                self.cache, self.own_cache = DynamicCache(), True
            check_growing(self.cache, "halting")
        kept = None if halts_nothing(self.model) else self.cache
        watched = self.watch.targets is not None or self.watch.tracker is not None
        may_stop = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or watched)
        self.watch.halting = Halting(self.gates, self.config, self.steps, kept, self.layers, may_stop=may_stop)
        return self.watch.halting

    def run(self, embeds: Tensor, sequence_steps: Tensor | None = None, **options: Any) -> Any:
        """The backbone's output in the last pass on token embeddings (B, T, D). `options` go to every pass."""
        scale = self.watch.readout.scale * self.config.initial_scale
        if scale != 1.0:
            embeds = embeds * scale
        if self.gate is not None and self.steps == 0 and torch.is_grad_enabled():
            # Under ZeRO-3 a weight that a step does not use keeps the gradient of the step before. So this gate gets 0.
            embeds = self.gate(embeds, torch.zeros_like(embeds))
        if self.gates is not None and torch.is_grad_enabled():
            embeds = touch(list(self.gates)[self.steps :], embeds)
        halting = self.halting
        if halting is not None and self.own_cache and options.get("attention_mask") is None:
            options["attention_mask"] = packing_mask(options.get("position_ids"), embeds, self.config)

        def one_pass(e: Tensor, index: int) -> Tensor:
            heads = {"heads": True} if self.watch.heads and index == self.steps else {}
            self.output = self.model.run_pass(e, index, self._view(index), **options, **heads)
            if heads:
                self.watch.ahead = self.output.ahead
            if self.watch.tracker is not None:
                self.watch.tracker.saw(e, self.output.last_hidden_state)
            return self.output.last_hidden_state

        run_pass: RunPass = one_pass
        settled = None
        if self.exit_kl is not None and self.cache is not None:
            # A prompt takes all passes, because every later token reads its keys and values in the caches.
            decoding = embeds.shape[1] == 1 and self.cache.get_seq_length() > 0
            settled = self._settled(self.cache, self.exit_kl) if decoding else None
        feedback: Feedback = self.watch.feedback
        if halting is not None:
            settled, feedback = halting.decide, halting.weighting(feedback)
        if self.first_differentiated > 0:  # the feedback of earlier passes is a constant
            run_pass, feedback = (constant_before(self.first_differentiated, part) for part in (run_pass, feedback))
        ponder(run_pass, feedback, embeds, self.steps, self.config.residual, settled, sequence_steps)
        return self.output

    def _view(self, index: int) -> PassView | None:
        if self.halting is not None and (view := self.halting.view(index)) is not None:
            return view
        return None if self.cache is None else PassView(self.cache, index, self.layers)

    def _settled(self, cache: Cache, exit_kl: float) -> Callable[[Tensor, int], bool]:
        """A function that tells whether a pass changed the prediction of every row by less than `exit_kl`.

        If so, it fills the caches of the passes that are left out.
        """
        before: list[Tensor] = []

        def settled(hidden: Tensor, index: int) -> bool:
            after = self.watch.readout.kept_logits(hidden).log_softmax(-1)  # (B, V), of one token a row
            moved = (after.exp() * (after - before[0])).sum(-1).max().item() if before else math.inf
            before[:] = [after]
            if moved >= exit_kl:
                return False
            copy_newest(cache, hidden.shape[1], index, self.steps + 1, self.layers)
            return True

        return settled


def checked_steps(steps: Any) -> int:
    """The number of pondering steps. Raises ValueError if it is not one."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"pondering_steps is {steps!r}; expected an integer of at least 0")
    return steps


def constant_before(first: int, function: RunPass) -> RunPass:
    """Wrap a function of a tensor and a pass number, so that the passes before `first` get no gradient."""

    def run(tensor: Tensor, index: int) -> Tensor:
        if index >= first:
            return function(tensor, index)
        with torch.no_grad():
            return function(tensor, index)

    return run


def checked_sequence_steps(steps: Tensor | None, embeds: Tensor, backward_passes: int | None) -> Tensor | None:
    """The pondering steps of each sequence, (B,), on the device of `embeds` (B, T, D). Raises ValueError if wrong."""
    if backward_passes is not None:
        if not isinstance(backward_passes, int) or isinstance(backward_passes, bool) or backward_passes < 1:
            raise ValueError(f"backward_passes is {backward_passes!r}; expected an integer of at least 1, or None")
        if steps is not None:
            raise ValueError(
                "backward_passes and sequence_steps exclude each other, because a sequence that ends early would get "
                "no gradient through its own last passes; leave one of them out"
            )
    if steps is None:
        return None
    rows = embeds.shape[0]
    if not isinstance(steps, Tensor) or steps.shape != (rows,) or steps.is_floating_point() or steps.is_complex():
        found = f"{steps.dtype} {tuple(steps.shape)}" if isinstance(steps, Tensor) else repr(steps)
        raise ValueError(f"sequence_steps is {found}; expected one integer for each of the {rows} sequences")
    return steps.to(embeds.device)
