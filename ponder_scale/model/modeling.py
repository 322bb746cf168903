"""Pondering versions of transformers' causal language models.

`Ponder` is mixed in before a stock class and replaces its `forward` by the recurrence of `ponder.py`. Modules and
state-dict keys stay those of the stock class. B batch, T tokens, D hidden size, V vocabulary, L layers.

Another decoder of transformers is added in four places, as OLMo 2 was:
    1. configuration.py: a class over PonderingFields and its configuration, with a `model_type` of its own;
    2. here: a class over Ponder and its `...ForCausalLM`, with the ends of the names of its two output projections and,
       where its backbone does not call them `layers`, the name of its layers;
    3. build.py: its row in ARCHITECTURES, and the name in `ModelConfig.architecture`;
    4. tests/model/architectures.py: its row, with which every test of the model and of generation runs on it.
The backbone has to take `inputs_embeds`, `attention_mask`, `position_ids` and `past_key_values`, and its head has to be
a linear layer without bias. Attention over a window is not supported: the passes of a cache would need a window each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM, Olmo2ForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from .backends import IGNORE_INDEX, Statistics
from .cache import PassView, SharedView, check_growing, check_shared, copy_newest, grow
from .changes import ChangeTracker, PassChanges
from .configuration import PonderGPT2Config, PonderGPTNeoXConfig, PonderLlamaConfig, PonderOlmo2Config
from .ponder import ponder
from .pondering_embedding import cross_entropy, pondering_embedding

if TYPE_CHECKING:
    # not imported, only named: transformers up to 5.0 caches the modules that this file names, and no further ones
    from .kernels import LOG2_E  # noqa: F401


@dataclass
class PonderOutput(CausalLMOutputWithPast):
    """The stock output and, when labels were given, what each pass predicted.

    Args:
        pass_losses: mean cross-entropy of each pass in nats, fp32 (S + 1,), without gradient.
        pass_entropies: mean entropy in nats, fp32 (S + 1,): of the pondering softmax of the first S passes where
            there is one, else of the prediction.
        z_loss: mean over the labels that count of what the z-loss adds to `loss`, where it is on; without gradient.
        changes: what each pass changed, where `track` asked for it.
    """

    pass_losses: Tensor | None = None
    pass_entropies: Tensor | None = None
    z_loss: Tensor | None = None
    changes: PassChanges | None = None


class Ponder:
    """Mixin over a `...ForCausalLM` of transformers. Subclasses name their output projections and layers."""

    output_projections: tuple[str, ...] = ()  # ends of the module names that write into the residual stream
    layers_name = "layers"  # of the backbone's list of layers

    def run_pass(self, embeds: Tensor, index: int, view: PassView | None, **kwargs: Any) -> Any:
        """The backbone's output for pass `index` on embeddings (B, T, D). Recomputation wraps this method."""
        # use_cache only makes the backbone create a cache where it got none; ours is always passed in
        return self.base_model(inputs_embeds=embeds, past_key_values=view, use_cache=False, **kwargs)  # type: ignore[attr-defined]

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers."""
        return getattr(self.base_model, self.layers_name)  # type: ignore[attr-defined]

    @property
    def num_layers(self) -> int:
        """L, counted in the backbone: generation with early exit edits the configuration."""
        return len(self.layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pondering_steps: int | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        exit_kl: float | None = None,
        share_cache: bool = False,
        z_loss: float = 0.0,
        track: int | None = None,
        **kwargs: Any,
    ) -> PonderOutput:
        """The stock forward, pondering first. `generate` takes pondering_steps, exit_kl and share_cache too.

        Args:
            labels: (B, T), shifted here as in the stock class, -100 is ignored; or `shift_labels`, shifted already.
            pondering_steps: overrides the configuration's S.
            num_items_in_batch: divides the summed loss; default the number of labels that count.
            skip_logits: leave `logits` None and never build them, (B, T, V). Default: in training with labels.
            exit_kl: in decoding, stop when a pass moved the prediction by less than this KL divergence in nats.
            share_cache: keep the keys and values of the last pass only, see `cache.SharedView`.
            z_loss: adds so much of the mean squared log-sum-exp of the last pass's logits to the loss.
            track: look at so many of the tokens for what each pass changes, see `changes`.

        Raises ValueError for arguments that exclude each other and for a cache that another setting filled.
        """
        steps = _checked_steps(self.config.pondering_steps if pondering_steps is None else pondering_steps)  # type: ignore[attr-defined]
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        targets = _targets(labels, shift_labels)
        first = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[attr-defined]
        passes = _Passes(self, steps, past_key_values, share_cache, exit_kl, targets)
        passes.tracker = None if track is None else ChangeTracker(track)
        hidden = passes.run(first, attention_mask=attention_mask, position_ids=position_ids, **kwargs)  # (B, T, D)
        head = self.get_output_embeddings()  # type: ignore[attr-defined]
        loss, pass_losses, pass_entropies, z_term, logits = None, None, None, None, None
        if targets is not None:
            total, last = cross_entropy(hidden, head.weight, targets, z_loss=z_loss)
            every = [*passes.statistics, last]
            loss, pass_losses, pass_entropies, z_term = _reduce(total, every, targets, num_items_in_batch)
        if skip_logits is None:
            skip_logits = self.training and targets is not None  # type: ignore[attr-defined]
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head(hidden[:, kept])
        return PonderOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=passes.output.get("hidden_states"),
            attentions=passes.output.get("attentions"),
            pass_losses=pass_losses,
            pass_entropies=pass_entropies,
            z_loss=z_term if z_loss else None,
            changes=None if passes.tracker is None else passes.tracker.changes(head.weight),
        )

    def draft(self, pondering_steps: int) -> Any:
        """This model pondering fewer steps, on the same weights: `generate(..., assistant_model=model.draft(0))`.

        The draft proposes tokens, this model checks several of them in one forward, and the text stays its own.
        """
        other = copy.copy(self)
        for name in ("config", "generation_config"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        other.config.pondering_steps = _checked_steps(pondering_steps)  # type: ignore[attr-defined]
        return other

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching keeps one key-value slot a layer, so the passes would overwrite each other."""
        raise ValueError(
            "continuous batching is silently wrong for a pondering model: its paged cache has one slot a layer and "
            "S + 1 passes need their own; use generate, which takes padded batches"
        )

    # the other ways into it, as transformers 5 has them
    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def post_init(self) -> None:
        """Initialize as the published code does, over transformers' own initialization."""
        super().post_init()  # type: ignore[misc]
        self._init_as_published()

    @torch.no_grad()
    def _init_as_published(self) -> None:
        """Truncated normal (3 sigma) with variance 2 / (5 D); output projections / sqrt(2 L), or sqrt(2 L (S + 1)).

        Source: LUMIA-Group/PonderingLM, `_init_weights`. Its GPT-NeoX divides by the passes too, the others do not.
        """
        config = self.config  # type: ignore[attr-defined]
        base = math.sqrt(2.0 / (5.0 * config.hidden_size))
        passes = config.pondering_steps + 1 if config.init_by_passes else 1
        done: set[int] = set()
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            # a tied head is the table, whose padding row would not stay zero
            if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or id(module.weight) in done:
                continue
            done.add(id(module.weight))
            std = base
            if name.endswith(self.output_projections):
                std = base / math.sqrt(2.0 * config.num_hidden_layers * passes)
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()


class _Passes:
    """One forward's passes over a model: the recurrence, with the caches and statistics it leaves behind.

    Args:
        targets: next tokens (B, T), -100 where there is none; asks for the statistics of each pass.

    Attributes:
        output: the backbone's output of the last pass.
        tracker: shown each pass, where one is set.
        statistics: of the pondering softmax of each pass but the last.
    """

    def __init__(
        self,
        model: Any,
        steps: int,
        cache: Cache | None,
        share_cache: bool,
        exit_kl: float | None,
        targets: Tensor | None,
    ) -> None:
        self.model, self.steps, self.cache, self.shared = model, steps, cache, share_cache
        self.exit_kl, self.targets = exit_kl, targets
        self.output: Any = None
        self.tracker: ChangeTracker | None = None
        self.statistics: list[Statistics | None] = []
        self.layers = model.num_layers
        config, table = model.config, model.get_input_embeddings().weight
        self.scale = math.sqrt(table.shape[1]) if config.scale_embeds else 1.0
        if exit_kl is not None:
            check_growing(cache, "exit_kl")
            if share_cache:
                raise ValueError("exit_kl leaves out the last pass, which alone fills the cache under share_cache")
        if cache is not None and share_cache:
            check_shared(cache, self.layers)
        elif cache is not None:
            grow(cache, steps + 1, self.layers)

    def run(self, embeds: Tensor, **kwargs: Any) -> Tensor:
        """The hidden states of the last pass on token embeddings (B, T, D); `kwargs` go to every pass."""
        config = self.model.config
        if self.scale * config.initial_scale != 1.0:
            embeds = embeds * (self.scale * config.initial_scale)

        def run_pass(e: Tensor, index: int) -> Tensor:
            self.output = self.model.run_pass(e, index, self._view(index), **kwargs)
            if self.tracker is not None:
                self.tracker.saw(e, self.output.last_hidden_state)
            return self.output.last_hidden_state

        settled = None
        if self.exit_kl is not None and self.cache is not None:
            # a prompt is pondered to the end: what it leaves in the caches is read by every later token
            decoding = embeds.shape[1] == 1 and self.cache.get_seq_length() > 0
            settled = self._settled(self.cache, self.exit_kl) if decoding else None
        return ponder(run_pass, self._feedback, embeds, self.steps, config.residual, settled)

    def _view(self, index: int) -> PassView | None:
        if self.cache is None:
            return None
        if self.shared:
            return SharedView(self.cache, index == self.steps, self.layers)
        return PassView(self.cache, index, self.layers)

    def _feedback(self, hidden: Tensor, index: int) -> Tensor:
        config, head = self.model.config, self.model.get_output_embeddings().weight
        if config.feedback == "hidden":
            seen = None
            if self.targets is not None:
                with torch.no_grad():  # no product with the vocabulary belongs to this feedback, so these cost one
                    _, seen = cross_entropy(hidden, head, self.targets)
            self.statistics.append(seen)
            return hidden
        mixed, seen = pondering_embedding(
            hidden,
            head,
            self.model.get_input_embeddings().weight,
            temperature=config.pondering_temperature,
            scale=self.scale,
            top_k=config.pondering_top_k,
            labels=self.targets,
        )
        self.statistics.append(seen)
        return mixed

    def _settled(self, cache: Cache, exit_kl: float) -> Callable[[Tensor, int], bool]:
        """Whether a pass changed no row's prediction by `exit_kl` or more. Fills the caches of the passes left out."""
        before: list[Tensor] = []

        def settled(hidden: Tensor, index: int) -> bool:
            after = self.model.get_output_embeddings()(hidden[:, -1]).float().log_softmax(-1)  # (B, V)
            moved = (after.exp() * (after - before[0])).sum(-1).max().item() if before else math.inf
            before[:] = [after]
            if moved >= exit_kl:
                return False
            copy_newest(cache, hidden.shape[1], index, self.steps + 1, self.layers)
            return True

        return settled


def _checked_steps(steps: int) -> int:
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"pondering_steps is {steps!r}; expected an integer of at least 0")
    return steps


def _targets(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]  # (B, T)


def _reduce(
    total: Tensor, passes: list[Any], targets: Tensor, num_items: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The summed loss by `num_items`; means over the labels that count: each pass's loss and entropy, the z-loss."""
    counted = (targets != IGNORE_INDEX).reshape(-1)
    count = counted.sum().clamp(min=1)
    with torch.no_grad():
        losses = torch.stack([seen.loss.sum() for seen in passes]) / count
        entropies = torch.stack([(seen.entropy * counted).sum() for seen in passes]) / count
        z_loss = (total - passes[-1].loss.sum()) / count
    return total / (count if num_items is None else num_items), losses, entropies, z_loss


class PonderLlamaForCausalLM(Ponder, LlamaForCausalLM):
    """LLaMA that ponders."""

    config_class = PonderLlamaConfig
    output_projections = ("self_attn.o_proj", "mlp.down_proj")


class PonderOlmo2ForCausalLM(Ponder, Olmo2ForCausalLM):
    """OLMo 2 that ponders."""

    config_class = PonderOlmo2Config
    output_projections = ("self_attn.o_proj", "mlp.down_proj")


class PonderGPT2LMHeadModel(Ponder, GPT2LMHeadModel):
    """GPT-2 that ponders. The position embedding is not pondered on: the backbone adds it anew in every pass."""

    config_class = PonderGPT2Config
    output_projections = ("attn.c_proj", "mlp.c_proj")
    layers_name = "h"


class PonderGPTNeoXForCausalLM(Ponder, GPTNeoXForCausalLM):
    """GPT-NeoX (Pythia) that ponders. The head is `lm_head`, which transformers called `embed_out` before 5.1."""

    config_class = PonderGPTNeoXConfig
    output_projections = ("attention.dense", "mlp.dense_4h_to_h")
    _tied_weights_keys = (
        {"lm_head.weight": "gpt_neox.embed_in.weight"}
        if isinstance(GPTNeoXForCausalLM._tied_weights_keys, dict)
        else ["lm_head.weight"]  # before transformers 5
    )

    def __setattr__(self, name: str, value: Any) -> None:
        # one name in our files, whichever version reads them: under the other it would start at random, with a warning
        super().__setattr__("lm_head" if name == "embed_out" else name, value)

    @property
    def embed_out(self) -> nn.Module:
        """The head, where an older stock method looks for it."""
        return self.lm_head
