"""A backbone of transformers that ponders when it is called.

Other code, such as fused losses, value heads and embedders, calls the backbone and then the head. So the recurrence
runs here, and `modeling.py` adds the head and the loss. `one_pass` is one plain pass of the stock backbone.

B batch, T tokens, D hidden size, L layers, S pondering steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .backends import Statistics, is_fake
from .cache import PassView, check_growing, copy_newest, grow
from .changes import ChangeTracker, PassChanges
from .compat import (
    DOCUMENT_BOUNDS,
    by_position,
    cache_name,
    known_arguments,
    one_cache,
    only_known,
    parameters,
    warn_of_untested_version,
)
from .ponder import Feedback, RunPass, ponder
from .readout import Ops, Readout


class Checkpointing:
    """Mixin over a model of transformers, whose gradient checkpointing it makes safe for passes that share weights."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute each layer of each pass in backward, with the non-reentrant form.

        Raises:
            ValueError: `use_reentrant=True` was asked for.
        """
        chosen = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        with warnings.catch_warnings():  # transformers 5 has a new name for this, and the old one is what is overridden
            warnings.simplefilter("ignore", FutureWarning)
            super().gradient_checkpointing_enable(chosen, **options)  # type: ignore[misc]

    def _set_gradient_checkpointing(self, *arguments: Any, **options: Any) -> None:
        # every way to switch it on in transformers ends here
        function = options.get("gradient_checkpointing_func", arguments[1] if len(arguments) > 1 else None)
        enabled = options.get("enable", arguments[0] if arguments else True)
        if enabled and getattr(function, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "use_reentrant=True silently loses the gradients of all but one pass under ZeRO-3, because the passes "
                "share their weights; leave it out, or give gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        super()._set_gradient_checkpointing(*arguments, **options)  # type: ignore[misc]


class PonderBackbone(Checkpointing):
    """Mixin over a backbone such as `LlamaModel`. It uses the head and the configuration of its causal model."""

    def __init__(self, config: Any, *, within: Any = None) -> None:
        """A backbone of the causal model `within`.

        Raises:
            ValueError: `within` is missing. Every pass needs the head. A server that built the bare backbone would also
                give each layer one key-value slot, but each of the S + 1 passes needs its own.
        """
        if within is None:
            raise ValueError(
                f"{type(self).__name__} ponders with the head of its causal model, so it cannot be built alone, as "
                "AutoModel would do; load the folder with AutoModelForCausalLM and take its base_model"
            )
        super().__init__(config)  # type: ignore[call-arg]
        self._within = (within,)  # in a tuple, because as a submodule it would be saved and moved twice
        self._cache_name = cache_name(parameters(self.stock_forward))
        self._known = known_arguments(self.stock_forward)
        warn_of_untested_version()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that the stock class initializes it. transformers 5 would skip a part of that for custom code."""
        return False

    @property
    def causal(self) -> Any:
        """The causal model that this backbone is a part of."""
        return self._within[0]

    @property
    def stock_forward(self) -> Any:
        """The stock forward of transformers, which is one plain pass."""
        return super().forward  # type: ignore[misc]

    def one_pass(self, embeds: Tensor, view: PassView | None = None, **options: Any) -> Any:
        """The output of one stock pass on embeddings (B, T, D), which are not scaled. Nothing is fed back."""
        # use_cache would only make the backbone create a cache if it got none, and we pass ours
        options |= {"use_cache": False, "return_dict": True, self._cache_name: view}
        return super().forward(inputs_embeds=embeds, **options)  # type: ignore[misc]

    @by_position
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        pondering_steps: int | None = None,
        exit_kl: float | None = None,
        sequence_steps: Tensor | None = None,
        backward_passes: int | None = None,
        return_dict: bool | None = None,
        watch: Watch | None = None,
        **options: Any,
    ) -> Any:
        """The stock output of the last of the S + 1 passes, with the hidden states (B, T, D) that the head reads.

        Args:
            pondering_steps, exit_kl, sequence_steps, backward_passes: see `Ponder.forward`.
            watch: records the statistics, losses and changes of each pass.
            options: arguments of the stock backbone, for each pass.

        Raises:
            TypeError: the stock backbone does not know an argument.
            ValueError: arguments exclude each other, a field of the configuration is out of its range, the cache was
                filled with another setting, or attention would not separate the documents of a row.
        """
        options = only_known(options, self._known)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        watch = Watch(self.causal) if watch is None else watch
        found = one_cache(past_key_values, cache)
        if use_cache and found is None:
            found = DynamicCache()
        check_documents(found, **options)
        options.pop("seq_idx", None)  # it is for layers that these architectures do not have
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
        sequence_steps = checked_sequence_steps(sequence_steps, inputs_embeds, backward_passes)
        passes = _Passes(watch, pondering_steps, found, exit_kl, backward_passes)
        output = passes.run(inputs_embeds, sequence_steps, **options)
        if found is not None:  # return the whole cache instead of the view that the pass returned
            setattr(output, "cache" if hasattr(output, "cache") else "past_key_values", found)
        plain = self.config.return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        return output if plain else output.to_tuple()


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
    """

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
        weight = 0.0 if self.weights is None or self.targets is None else self.weights[index]
        learn, total = weight > 0 and torch.is_grad_enabled(), None
        if self.causal.config.feedback == "hidden":
            fed_back, seen = hidden, None
            if self.targets is not None:  # they cost a product with the vocabulary, because this feedback has none
                with nullcontext() if learn else torch.no_grad():
                    total, seen = self.readout.cross_entropy(hidden, self.targets)
        else:
            fed_back, seen = self.readout.pondering_embedding(hidden, self.targets, learn=learn)
            if self.causal.config.feedback == "both":
                fed_back = self.causal.hidden_gate(fed_back, hidden)
        self.statistics.append(seen)
        if weight > 0 and seen is not None:
            self.learned.append(weight * (seen.loss.sum() if total is None else total))
        return fed_back

    def changes(self) -> PassChanges | None:
        """What each pass changed. None if `track` was not given."""
        return None if self.tracker is None else self.tracker.changes(self.readout.logits)


class _Passes:
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
        self.cache, self.exit_kl = cache, exit_kl
        self.layers = self.model.num_layers
        self.gate = getattr(self.model, "hidden_gate", None)
        if self.config.feedback == "both" and self.steps > 0 and self.gate is None:
            raise ValueError(
                "feedback is 'both', but this model was made without a gate; set feedback and pondering_steps when you "
                "create or load the model"
            )
        self.output: Any = None
        if exit_kl is not None:
            check_growing(cache, "exit_kl")
        if cache is not None:
            grow(cache, self.steps + 1, self.layers)

    def run(self, embeds: Tensor, sequence_steps: Tensor | None = None, **options: Any) -> Any:
        """The backbone's output in the last pass on token embeddings (B, T, D). `options` go to every pass."""
        scale = self.watch.readout.scale * self.config.initial_scale
        if scale != 1.0:
            embeds = embeds * scale
        if self.gate is not None and self.steps == 0 and torch.is_grad_enabled():
            # Under ZeRO-3 a weight that a step does not use keeps the gradient of the step before. So this gate gets 0.
            embeds = self.gate(embeds, torch.zeros_like(embeds))

        def one_pass(e: Tensor, index: int) -> Tensor:
            self.output = self.model.run_pass(e, index, self._view(index), **options)
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
        if self.first_differentiated > 0:  # the feedback of earlier passes is a constant
            run_pass, feedback = (constant_before(self.first_differentiated, part) for part in (run_pass, feedback))
        ponder(run_pass, feedback, embeds, self.steps, self.config.residual, settled, sequence_steps)
        return self.output

    def _view(self, index: int) -> PassView | None:
        return None if self.cache is None else PassView(self.cache, index, self.layers)

    def _settled(self, cache: Cache, exit_kl: float) -> Callable[[Tensor, int], bool]:
        """A function that tells whether a pass changed the prediction of every row by less than `exit_kl`.

        If so, it fills the caches of the passes that are left out.
        """
        before: list[Tensor] = []

        def settled(hidden: Tensor, index: int) -> bool:
            after = self.watch.readout.logits(hidden[:, -1]).float().log_softmax(-1)  # (B, V)
            moved = (after.exp() * (after - before[0])).sum(-1).max().item() if before else math.inf
            before[:] = [after]
            if moved >= exit_kl:
                return False
            copy_newest(cache, hidden.shape[1], index, self.steps + 1, self.layers)
            return True

        return settled


def check_documents(
    cache: Cache | None, attention_mask: Any = None, position_ids: Tensor | None = None, **options: Any
) -> None:
    """Raise ValueError if a row holds several documents and transformers would let them see each other.

    Compiled code raises RuntimeError.

    transformers separates documents by positions (B, T) that start again, and only without a mask (B, T) and a cache.
    """
    if position_ids is None:
        said = sorted(name for name in DOCUMENT_BOUNDS & options.keys() if options[name] is not None)
        if said:
            raise ValueError(
                f"only flash attention obeys {said[0]} without position_ids, and elsewhere the documents would see "
                "each other; give position_ids that start at 0 in each document"
            )
        return
    masked = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    unseen = cache is not None and attention_mask is None
    if not (masked or unseen) or position_ids.shape[-1] < 2 or is_fake(position_ids):
        return
    starts = position_ids.diff(dim=-1) <= 0  # (B, T - 1)
    if masked:  # masked tokens may have any positions
        seen = attention_mask[:, -position_ids.shape[-1] :].bool()
        starts = starts & seen[:, 1:] & seen[:, :-1]
    given = "an attention_mask of (B, T)" if masked else "a cache"
    message = (
        f"position_ids start again within a row, so the row holds several documents, but with {given} transformers "
        f"does not separate them, and they would see each other; leave {given} out"
    )
    if torch.compiler.is_compiling():  # a compiled graph cannot branch
        torch._assert_async(~starts.any(), message)
    elif starts.any():
        raise ValueError(message)


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
