"""Methods that follow each token by K more positions, where pondering runs all positions again. K = `pondering_steps`.

    x_1  z_11 .. z_1K  x_2  z_21 .. z_2K  ...            one causal sequence of (K + 1) T positions, run by f
    z_tj = h_{t,j-1}                                     "latent": the last hidden state of the position before
    z_tj = c * initial_scale * p                         "pause": p is one learned embedding; c as in ponder.py
    logits_t = head(h_tK)                                the last position of a token predicts the next token

"latent" is PonderLM-2 (arXiv 2509.23184), and "pause" the baseline of both papers (pause tokens, arXiv 2310.02226). All
positions of a token have the token's own place in the text, for rotary and for learned positions alike.

A latent waits for all latents before it. Jacobi iterations find them together: run f, take each position's hidden state
as the next latent, and repeat. The first K iterations have 1 to K positions a token, because they add one latent each.
R refinements follow, and then the pass that predicts. After n iterations the first n latents of a text are exact, so
K (T - 1) refinements give exactly what a token after the other gives, and a few are near. Gradients flow through all
iterations. Source: LUMIA-Group/PonderLM-2 at fa784be, `modeling_llama.py` and `modeling_gpt_neox.py`.

Without a cache this module takes R refinements, as the published evaluation. With one it is exact: a single token takes
K + 1 passes over one position each, and several tokens are iterated until their latents rest.

B batch, T tokens, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache import PassView, check_growing, grow
from .compat import DOCUMENT_BOUNDS
from .halting import packing_mask
from .passes import Watch, checked_steps

REFINEMENTS = 3  # of the published evaluation
# Latents rest when none changes by more than so many times what their dtype rounds, relative to the largest. In trained
# models an iteration changed a tenth of what the one before did, and about twice the rounding remained.
REST = 4
ATTENTIONS = ("sdpa", "eager")  # flash attention would take each repeated position for a new document


class PositionView(PassView):
    """What positions `first` to `first + count - 1` of new tokens see: all of earlier tokens, and those before them.

    Position j of a token keeps its keys and values where pass j of a pondering model does, so every layer of the cache
    has as many entries as tokens were read.

    Args:
        positions: K + 1.
        keep: write the keys and values of the new positions into the cache.
    """

    def __init__(
        self, cache: Cache, layers: int, positions: int, first: int = 0, count: int = 1, *, begin: int, keep: bool
    ) -> None:
        super().__init__(cache, first, layers)
        self._first_position, self._count, self._positions = first, count, positions
        self._begin, self._keep = begin, keep  # tokens that were cached before the new ones

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The keys and values that the new positions see, with their own at the end, (B, heads, n, head width) each."""
        if self._keep:
            for place in range(self._count):
                own = slice(place, None, self._count)
                super().update(keys[..., own, :], values[..., own, :], place * self._layers + layer_idx)
        pairs = zip(self._seen(layer_idx), (keys, values), strict=True)
        return tuple(torch.cat([*seen, new], -2) if seen else new for seen, new in pairs)

    def _seen(self, layer_idx: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of earlier tokens, a position after the other, then those of the same tokens."""
        slots = [self._cache.layers[index * self._layers + layer_idx] for index in range(self._filled)]
        old = [(slot.keys[..., : self._begin, :], slot.values[..., : self._begin, :]) for slot in slots if self._begin]
        same = [
            (slot.keys[..., self._begin :, :], slot.values[..., self._begin :, :])
            for slot in slots[: self._first_position]
        ]
        return [keys for keys, _ in (*old, *same)], [values for _, values in (*old, *same)]

    @property
    def _filled(self) -> int:
        return self._positions if self._begin else self._first_position

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The number of positions that come before the new ones. There is one new token if it has come to `first`."""
        return self._begin * self._positions + self._first_position

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The same."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys, for the attention mask."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length  # a tensor before 5.0
        return self.get_seq_length() + new, 0


class Interleaved:
    """One forward over tokens and the positions between them.

    Args:
        steps: K, in place of the configuration's.
        refinements: R, without a cache. The default is the published one of evaluation.
    """

    def __init__(self, watch: Watch, steps: int | None, cache: Cache | None, refinements: int | None) -> None:
        self.watch, self.model, self.config = watch, watch.causal, watch.causal.config
        self.config.check_pondering()
        self.steps = self.config.pondering_steps if steps is None else checked_steps(steps)
        self.refinements = REFINEMENTS if refinements is None else refinements
        self.cache, self.layers = cache, self.model.num_layers
        self.begin = 0 if cache is None else cache.get_seq_length()
        self.pause: Any = getattr(self.model, "pause_embedding", None)
        if self.config.feedback == "pause" and self.steps > 0 and self.pause is None:
            raise ValueError(
                "feedback is 'pause', but this model was made without a pause embedding; set feedback and "
                "pondering_steps when you create or load the model"
            )
        if cache is not None:
            if self.steps > 0:
                check_growing(cache, f"feedback {self.config.feedback!r}")
            grow(cache, self.steps + 1, self.layers)
        self.output: Any = None
        self._runs = 0
        self._places: dict[tuple[int, int], dict[str, Tensor | None]] = {}  # passes of as many positions share them

    def run(self, embeds: Tensor, **options: Any) -> Any:
        """The backbone's output in the last pass on token embeddings (B, T, D), at the last position of each token."""
        embeds = self._scaled(embeds)
        if self.steps == 0:
            inputs, hidden = [embeds], [self._stock(embeds, options)]
        else:
            inputs, hidden = self._positions(embeds, options)
        self.output.last_hidden_state = hidden[-1]
        if self.watch.tracker is not None:
            for before, after in zip(inputs, hidden, strict=True):
                self.watch.tracker.saw(before, after)
        if self.watch.targets is not None:
            with torch.no_grad():
                for states in hidden[:-1]:
                    self.watch.statistics.append(self.watch.readout.cross_entropy(states, self.watch.targets)[1])
        return self.output

    def _positions(self, embeds: Tensor, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs and the hidden states of the K + 1 positions of each token, (B, T, D) each."""
        if self.pause is not None:
            inputs = [embeds, *[self._pause_rows(embeds)] * self.steps]
            return inputs, self._pass(inputs, options, keep=True)
        if self.cache is not None and embeds.shape[1] == 1:
            return self._one_token(embeds, options)
        return self._iterate(embeds, options)

    def _one_token(self, embeds: Tensor, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        inputs, hidden = [embeds], []
        for position in range(self.steps + 1):
            hidden += self._pass(inputs[position:], options, position, keep=True)
            inputs.append(hidden[-1])
        return inputs[:-1], hidden

    def _iterate(self, embeds: Tensor, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Jacobi iterations: R refinements without a cache, and until the latents rest with one."""
        inputs, exact = [embeds], self.cache is not None
        for _ in range(self.steps * embeds.shape[1] if exact else self.steps + self.refinements):
            before, inputs = inputs, [embeds, *self._pass(inputs, options)[: self.steps]]
            if exact and len(inputs) == len(before) and _rest(inputs[1:], before[1:]):
                break
        return inputs, self._pass(inputs, options, keep=True)

    def _pass(self, inputs: Sequence[Tensor], options: dict[str, Any], first: int = 0, *, keep: bool = False) -> Any:
        """The hidden states of positions of each token, (B, T, D) each, from their inputs.

        Args:
            first: the first of these positions, if earlier ones of the same token are in the cache already.
            keep: write them into the cache.
        """
        count, view = len(inputs), None
        if self.cache is not None:
            view = PositionView(self.cache, self.layers, self.steps + 1, first, count, begin=self.begin, keep=keep)
        if (first, count) not in self._places:
            self._places[first, count] = self._placed(inputs[0], options, first, count)
        placed = {**options, **self._places[first, count]}
        embeds = torch.stack(list(inputs), 2).flatten(1, 2)  # (B, count * T, D)
        self.output = self.model.run_pass(embeds, self._runs, view, **placed)
        self._runs += 1
        return list(self.output.last_hidden_state.unflatten(1, (-1, count)).unbind(2))

    def _placed(self, embeds: Tensor, options: Mapping[str, Any], first: int, count: int) -> dict[str, Tensor | None]:
        """The attention mask and the position ids of the positions of a pass, from those of the tokens (B, T, D)."""
        rows, tokens = embeds.shape[:2]
        mask, places = options.get("attention_mask"), options.get("position_ids")
        if mask is not None:
            new = mask[:, self.begin : self.begin + tokens]
            parts = [mask[:, : self.begin].repeat(1, self.steps + 1), new.repeat(1, first)]
            mask = torch.cat([*parts, new.repeat_interleave(count, 1)], 1)
        elif self.cache is None:
            mask = packing_mask(places, embeds, self.config, count)
            if mask is None:  # transformers would take each repeated position for a new document
                mask = torch.ones(rows, count * tokens, dtype=torch.long, device=embeds.device)
        if places is None:
            places = torch.arange(self.begin, self.begin + tokens, device=embeds.device).unsqueeze(0)
        return {"attention_mask": mask, "position_ids": places.repeat_interleave(count, -1)}

    def _stock(self, embeds: Tensor, options: dict[str, Any]) -> Tensor:
        """The hidden states of the stock model."""
        if self.pause is not None and torch.is_grad_enabled():
            # Under ZeRO-3 a weight that a step does not use keeps the gradient of the step before.
            embeds = embeds + 0.0 * self._pause_rows(embeds)
        view = None if self.cache is None else PassView(self.cache, 0, self.layers)
        self.output = self.model.run_pass(embeds, 0, view, **options)
        hidden: Tensor = self.output.last_hidden_state
        return hidden

    def _pause_rows(self, embeds: Tensor) -> Tensor:
        """The pause embedding as often as embeddings (B, T, D)."""
        index = torch.zeros(1, 1, dtype=torch.long, device=embeds.device)
        return self._scaled(self.pause(index)).to(embeds.dtype).expand_as(embeds)

    def _scaled(self, embeds: Tensor) -> Tensor:
        scale = self.watch.readout.scale * self.config.initial_scale
        return embeds if scale == 1.0 else embeds * scale


def _rest(new: Sequence[Tensor], old: Sequence[Tensor]) -> bool:
    """Whether latents have changed by no more than what their dtype rounds."""
    latents = torch.stack(list(new))
    change, size = (latents - torch.stack(list(old))).abs().max(), latents.abs().max()
    return bool(change <= REST * torch.finfo(latents.dtype).eps * size)


def refuse_with_interleaving(
    backbone: Any,
    steps: int | None,
    refinements: int | None,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Raise ValueError for what would be wrong beside `feedback` "latent" and "pause".

    Args:
        given: arguments that the passes of pondering know.
        options: arguments of the stock backbone.
    """
    config = backbone.config
    feedback = config.feedback
    if refinements is not None:
        if feedback != "latent":
            raise ValueError(f"refinements with feedback {feedback!r}, which has no latents to refine; leave it out")
        if not isinstance(refinements, int) or isinstance(refinements, bool) or refinements < 0:
            raise ValueError(f"refinements is {refinements!r}; expected an integer of at least 0")
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} with feedback {feedback!r}, which has one prediction a token and no earlier passes to choose "
                f"from; leave {name} out"
            )
    if (config.pondering_steps if steps is None else steps) == 0:
        return
    for name in ("output_hidden_states", "output_attentions"):
        if options.get(name) or (options.get(name) is None and getattr(config, name, False)):
            raise ValueError(f"{name} would show {feedback!r} positions between the tokens; leave it out")
    if config._attn_implementation not in ATTENTIONS:
        raise ValueError(
            f"attention is {config._attn_implementation!r} with feedback {feedback!r}, whose positions repeat; use "
            f"{' or '.join(map(repr, ATTENTIONS))}"
        )
    mask = options.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError(f"with feedback {feedback!r} the attention_mask says which tokens are real; expected (B, T)")


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the stock backbone without those that count the tokens, where a pass has more positions."""
    return {name: value for name, value in options.items() if name not in {*DOCUMENT_BOUNDS, "cache_position"}}
