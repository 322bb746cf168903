"""A backbone of transformers that ponders when it is called.

Other code, such as fused losses, value heads and embedders, calls the backbone and then the head. So the recurrence
runs here, and `modeling.py` adds the head and the loss. `one_pass` is one plain pass of the stock backbone.

B batch, T tokens, D hidden size, L layers, S pondering steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .backends import is_fake
from .cache import PassView
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
from .configuration import INTERLEAVED
from .halting import refuse_with_halting
from .interleaved import Interleaved, own_options, refuse_with_interleaving
from .passes import Passes, Watch, checked_sequence_steps


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
        refinements: int | None = None,
        return_dict: bool | None = None,
        watch: Watch | None = None,
        **options: Any,
    ) -> Any:
        """The stock output of the last of the S + 1 passes, with the hidden states (B, T, D) that the head reads.

        Args:
            pondering_steps, exit_kl, sequence_steps, backward_passes, refinements: see `Ponder.forward`.
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
        given = {"exit_kl": exit_kl, "sequence_steps": sequence_steps, "backward_passes": backward_passes}
        output = self._run(watch, inputs_embeds, pondering_steps, refinements, found, given, options)
        name = "cache" if hasattr(output, "cache") else "past_key_values"
        if found is not None:  # return the whole cache instead of the view that the pass returned
            setattr(output, name, found)
        elif output.get(name) is not None:  # a cache of this forward alone
            output = type(output)(**{key: value for key, value in output.items() if key != name})
        plain = self.config.return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        return output if plain else output.to_tuple()

    def _run(
        self,
        watch: Watch,
        embeds: Tensor,
        steps: int | None,
        refinements: int | None,
        cache: Cache | None,
        given: dict[str, Any],
        options: dict[str, Any],
    ) -> Any:
        """The output of the method that the configuration names, on token embeddings (B, T, D).

        Args:
            given: `exit_kl`, `sequence_steps` and `backward_passes`, which belong to passes over the same positions.
            options: arguments of the stock backbone.
        """
        if self.config.feedback in INTERLEAVED:  # type: ignore[attr-defined]
            refuse_with_interleaving(self, steps, refinements, {**given, "pass_weights": watch.weights}, options)
            return Interleaved(watch, steps, cache, refinements).run(embeds, **own_options(options))
        if refinements is not None:
            raise ValueError("refinements belong to feedback 'latent'; leave it out")
        if self.config.halting != "none":  # type: ignore[attr-defined]
            refuse_with_halting(self, given["exit_kl"], given["sequence_steps"], given["backward_passes"], options)
        passes = Passes(watch, steps, cache, given["exit_kl"], given["backward_passes"])
        return passes.run(embeds, given["sequence_steps"], **options)


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
