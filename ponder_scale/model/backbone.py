"""A backbone of transformers that ponders when it is called.

Other people's code calls the backbone and then the head: fused losses, value heads, embedders. So the recurrence runs
here, and `modeling.py` adds head and loss. One plain pass of the stock backbone is `one_pass`.

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
from .halting import refuse_with_halting
from .passes import Passes, Watch, checked_sequence_steps


class Checkpointing:
    """Mixin over a model of transformers: gradient checkpointing of the kind that shared passes survive."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute each layer of each pass in backward, by the non-reentrant form.

        Raises:
            ValueError: `use_reentrant=True` was asked for.
        """
        chosen = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        with warnings.catch_warnings():  # transformers 5 has a new name for this, and the old one is what is overridden
            warnings.simplefilter("ignore", FutureWarning)
            super().gradient_checkpointing_enable(chosen, **options)  # type: ignore[misc]

    def _set_gradient_checkpointing(self, *arguments: Any, **options: Any) -> None:
        # every way of transformers to switch it on ends here
        function = options.get("gradient_checkpointing_func", arguments[1] if len(arguments) > 1 else None)
        enabled = options.get("enable", arguments[0] if arguments else True)
        if enabled and getattr(function, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "use_reentrant=True loses the gradients of all but one pass under ZeRO-3, without a word, because the "
                "passes share their weights; leave it out, or give gradient_checkpointing_kwargs={'use_reentrant': "
                "False}"
            )
        super()._set_gradient_checkpointing(*arguments, **options)  # type: ignore[misc]


class PonderBackbone(Checkpointing):
    """Mixin over a backbone, `LlamaModel` and others. Its head and its configuration are those of its causal model."""

    def __init__(self, config: Any, *, within: Any = None) -> None:
        """A backbone of the causal model `within`.

        Raises:
            ValueError: there is none. The head is needed in every pass, and a server that builds the bare backbone
                would give each layer one key-value slot, where S + 1 passes need their own.
        """
        if within is None:
            raise ValueError(
                f"{type(self).__name__} ponders with the head of its causal model, so it is not built alone (AutoModel "
                "would do that); load the folder by AutoModelForCausalLM and take its base_model"
            )
        super().__init__(config)  # type: ignore[call-arg]
        self._within = (within,)  # in a tuple: as a module of its own it would be saved and moved twice
        self._cache_name = cache_name(parameters(self.stock_forward))
        self._known = known_arguments(self.stock_forward)
        warn_of_untested_version()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: it is initialized by the stock class, which transformers 5 would cut short in other people's code."""
        return False

    @property
    def causal(self) -> Any:
        """The causal model that this backbone is a part of."""
        return self._within[0]

    @property
    def stock_forward(self) -> Any:
        """One plain pass, as transformers has it."""
        return super().forward  # type: ignore[misc]

    def one_pass(self, embeds: Tensor, view: PassView | None = None, **options: Any) -> Any:
        """The output of the stock backbone, once, on embeddings (B, T, D); nothing is scaled or fed back."""
        # use_cache only makes the backbone create a cache where it got none; ours is always passed in
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
        """The stock output, of the last of the S + 1 passes: the hidden states (B, T, D) that the head reads.

        Args:
            pondering_steps, exit_kl, sequence_steps, backward_passes: see `Ponder.forward`.
            watch: shown what each pass leaves.
            options: of the stock backbone, for each pass.

        Raises:
            TypeError: an argument that the stock backbone does not know.
            ValueError: arguments that exclude each other, a field of the configuration that is out of its range, a
                cache that another setting filled, documents in one row that attention would not keep apart.
        """
        options = only_known(options, self._known)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        watch = Watch(self.causal) if watch is None else watch
        found = one_cache(past_key_values, cache)
        if use_cache and found is None:
            found = DynamicCache()
        check_documents(found, **options)
        options.pop("seq_idx", None)  # for layers that these architectures do not have
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
        sequence_steps = checked_sequence_steps(sequence_steps, inputs_embeds, backward_passes)
        if self.config.halting != "none":  # type: ignore[attr-defined]
            refuse_with_halting(self, exit_kl, sequence_steps, backward_passes, options)
        passes = Passes(watch, pondering_steps, found, exit_kl, backward_passes)
        output = passes.run(inputs_embeds, sequence_steps, **options)
        name = "cache" if hasattr(output, "cache") else "past_key_values"
        if found is not None:  # the whole one, where the pass has put its view of it
            setattr(output, name, found)
        elif output.get(name) is not None:  # that of one forward alone
            output = type(output)(**{key: value for key, value in output.items() if key != name})
        plain = self.config.return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        return output if plain else output.to_tuple()


def check_documents(
    cache: Cache | None, attention_mask: Any = None, position_ids: Tensor | None = None, **options: Any
) -> None:
    """Raise ValueError where a row holds several documents, and transformers would let them see each other.

    Compiled code raises RuntimeError.

    It tells them apart by positions (B, T) that start again, and only without a mask (B, T) and without a cache.
    """
    if position_ids is None:
        said = sorted(name for name in DOCUMENT_BOUNDS & options.keys() if options[name] is not None)
        if said:
            raise ValueError(
                f"{said[0]} without position_ids is obeyed by flash attention alone, elsewhere the documents would "
                "see each other; give position_ids that start at 0 with each document"
            )
        return
    masked = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    unseen = cache is not None and attention_mask is None
    if not (masked or unseen) or position_ids.shape[-1] < 2 or is_fake(position_ids):
        return
    starts = position_ids.diff(dim=-1) <= 0  # (B, T - 1)
    if masked:  # what is masked has any positions
        seen = attention_mask[:, -position_ids.shape[-1] :].bool()
        starts = starts & seen[:, 1:] & seen[:, :-1]
    given = "an attention_mask of (B, T)" if masked else "a cache"
    message = (
        f"position_ids start again within a row, so it holds several documents, which {given} hides from "
        "transformers: they would see each other; leave it out"
    )
    if torch.compiler.is_compiling():  # a graph has no branches
        torch._assert_async(~starts.any(), message)
    elif starts.any():
        raise ValueError(message)
