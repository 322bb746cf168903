"""Pondering versions of transformers' causal language models.

`PonderBackbone` is a mixin before a stock backbone, which then ponders when it is called. `Ponder` is a mixin before
its causal class, to which it adds the head and the loss. Modules and state-dict keys stay those of the stock class.

B batch, T tokens, D hidden size, V vocabulary, L layers.

To add another decoder of transformers, change four places, as for OLMo 2:
    1. configuration.py: a class over PonderingFields and its configuration, with a `model_type` of its own;
    2. here: a class over PonderBackbone and its backbone, and a class over Ponder and its `...ForCausalLM`, with the
       ends of the names of its two output projections, and the name of its layers if that is not `layers`;
    3. build.py: its row in ARCHITECTURES, and the name in `ModelConfig.architecture`;
    4. tests/model/architectures.py: its row, with which every test of the model and of generation runs on it.
The backbone has to take `inputs_embeds`, `attention_mask`, `position_ids` and a cache. Attention over a window is not
supported, because each pass would need a window of its own in the cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaForCausalLM,
    LlamaModel,
    Olmo2ForCausalLM,
    Olmo2Model,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from .backbone import Checkpointing, PonderBackbone
from .cache import PassView
from .changes import PassChanges
from .compat import by_position, cache_name, one_cache
from .configuration import PonderGPT2Config, PonderGPTNeoXConfig, PonderLlamaConfig, PonderOlmo2Config
from .gate import HiddenGate
from .halting import HaltingGates, KeptView, Opening
from .losses import Wanted, losses, next_tokens
from .multi_token import ExtraHeads
from .passes import Watch, checked_steps
from .speculation import HeadDrafts

if TYPE_CHECKING:
    # Not imported, only named. transformers up to 5.0 caches the modules that this file names, and no others.
    from .attention import mix  # noqa: F401
    from .backends import wide  # noqa: F401
    from .interleaved import Interleaved  # noqa: F401
    from .kernels import LOG2_E  # noqa: F401
    from .learned import Learned  # noqa: F401
    from .operators import NAMESPACE  # noqa: F401
    from .ponder import ponder  # noqa: F401
    from .pondering_embedding import pondering_embedding  # noqa: F401
    from .products import exp_product  # noqa: F401
    from .readout import Ops, Readout  # noqa: F401
    from .sparse import gradients_by_kernels  # noqa: F401
    from .tiles import Tiles  # noqa: F401
    from .top_k import gradients  # noqa: F401

RunPass = Callable[..., Any]  # takes and returns the same as `Ponder.run_pass`
PassWrapper = Callable[..., Any]  # takes a RunPass, then its arguments; calls it
CACHE_NAME = cache_name([field.name for field in fields(CausalLMOutputWithPast)])  # name in the outputs of this version


@dataclass
class PonderOutput(CausalLMOutputWithPast):
    """The stock output and, if labels were given, the losses and entropies of each pass.

    Args:
        pass_losses: mean cross-entropy of each pass in nats, fp32 (S + 1,), without gradient. `loss` is that of the
            last pass, or the sum of all with `pass_weights`.
        pass_entropies: mean entropy in nats, fp32 (S + 1,), of the pondering softmax in each of the first S passes. If
            there is none, and for the last pass, that of the prediction.
        z_loss: the mean of what the z-loss adds to `loss`, over the labels that count, without gradient. None if off.
        pass_shares: share of the labels that count whose token is active in each pass, fp32 (S + 1,). None without
            halting.
        halting_loss: `loss` minus the loss of the last pass, where `halting_loss` was given; without gradient.
        multi_token_losses: mean cross-entropy of each extra head over its own labels in nats, (n,), without gradient.
            None without `multi_token_weight`.
        extra_logits: those of the extra heads at the same positions as `logits`, (n, B, T, V), where asked for.
        changes: what each pass changed. None if `track` was not given.
    """

    pass_losses: Tensor | None = None
    pass_entropies: Tensor | None = None
    z_loss: Tensor | None = None
    pass_shares: Tensor | None = None
    halting_loss: Tensor | None = None
    multi_token_losses: Tensor | None = None
    extra_logits: Tensor | None = None
    changes: PassChanges | None = None


class Ponder(Checkpointing):
    """Mixin over a `...ForCausalLM` of transformers. Subclasses name their backbone, output projections and layers."""

    backbone_class: Any
    output_projections: tuple[str, ...] = ()  # ends of the names of the modules that write into the residual stream
    layers_name, norm_name = "layers", "norm"  # the names of the backbone's list of layers and of its last norm
    wrappers: tuple[PassWrapper, ...] = ()  # around each pass, the last one outermost; for recomputation and counts
    _initialized = False

    def __init__(self, config: Any) -> None:
        config.check_pondering()  # a loader sets overrides after it has created the configuration
        # not the stock class's __init__, which would build the stock backbone
        PreTrainedModel.__init__(self, config)
        setattr(self, self.base_model_prefix, self.backbone_class(config, within=self))  # type: ignore[attr-defined]
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.feedback == "both" and config.pondering_steps > 0:
            self.hidden_gate = HiddenGate(config.hidden_size)
        if config.feedback == "pause" and config.pondering_steps > 0:
            self.pause_embedding = nn.Embedding(1, config.hidden_size)
        if config.halting != "none" and config.pondering_steps > 0:
            self.halting_gates = HaltingGates(config.hidden_size, config.pondering_steps)
        if config.extra_heads:
            self.extra_heads = ExtraHeads(config, type(self.layers[-1]))
        self.post_init()

    def run_pass(self, embeds: Tensor, index: int, view: PassView | None, **kwargs: Any) -> Any:
        """The backbone's output for pass `index` on embeddings (B, T, D), run inside `wrappers`."""
        run: RunPass = self._one_pass
        for wrapper in self.wrappers:
            run = partial(wrapper, run)
        return run(embeds, index, view, **kwargs)

    def _one_pass(self, embeds: Tensor, index: int, view: PassView | None, heads: bool = False, **kwargs: Any) -> Any:
        if isinstance(view, KeptView):
            embeds, kwargs = view.of_rows(embeds, kwargs)
        one_pass = partial(self.base_model.one_pass, embeds, view, **kwargs)  # type: ignore[attr-defined]
        if heads:
            norm = getattr(self.base_model, self.norm_name)  # type: ignore[attr-defined]
            output, ahead = self.extra_heads.beside(self.layers[-1], norm, one_pass)
            output.ahead = ahead
            return output
        output = one_pass()
        if isinstance(view, KeptView):
            output.last_hidden_state = view.keep(output.last_hidden_state)
        return output

    @property
    def stock_forward(self) -> Any:
        """The stock class's `forward`."""
        return super().forward  # type: ignore[misc]

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers."""
        return getattr(self.base_model, self.layers_name)  # type: ignore[attr-defined]

    @property
    def num_layers(self) -> int:
        """L, counted in the backbone, because generation with early exit edits the configuration."""
        return len(self.layers)

    @by_position
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        pondering_steps: int | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        exit_kl: float | None = None,
        sequence_steps: Tensor | None = None,
        backward_passes: int | None = None,
        refinements: int | None = None,
        z_loss: float = 0.0,
        pass_weights: Sequence[float] | None = None,
        halting_loss: tuple[float, float] | None = None,
        multi_token_weight: float | None = None,
        extra_logits: bool = False,
        track: int | None = None,
        ops: Ops | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock output, after pondering. `generate` takes pondering_steps and exit_kl too.

        Args:
            past_key_values: the cache, which transformers from 5.24 on calls `cache`.
            labels: (B, T), shifted here as in the stock class; -100 is ignored. Or `shift_labels`, already shifted.
            return_dict: False gives the stock class's tuple.
            pondering_steps: overrides the configuration's S.
            skip_logits: leave `logits` None and never build them, (B, T, V). This is the default in training with
                labels.
            exit_kl: in decoding, stop when a pass moved the prediction by less than this KL divergence in nats.
            sequence_steps: (B,) integers, each at most S: how many steps a sequence takes. All S + 1 passes run, but
                passes after a sequence's own last one do not change it, so its loss in them is that of its last.
            backward_passes: number of the last passes that gradients flow through. The feedback of earlier passes
                counts as a constant, and they keep nothing for backward. e_0 keeps its gradient.
            refinements: with feedback "latent", the Jacobi iterations after the first ones, see `interleaved.py`. The
                default is 3. With a cache the latents are exact, and this number is not used.
            num_items_in_batch, z_loss, pass_weights, halting_loss, multi_token_weight: what the loss is made of, see
                `losses.Wanted`.
            extra_logits: also return the logits of the extra heads, see `multi_token.py`.
            track: number of tokens on which to measure what each pass changes, see `changes`.
            ops: other code for the pondering embedding and the loss, see `readout`.

        Raises the errors of `PonderBackbone.forward`.
        """
        watch = Watch(self, next_tokens(labels, shift_labels), track, ops, pass_weights)
        wanted = Wanted(num_items_in_batch, z_loss, pass_weights, halting_loss, multi_token_weight)
        wanted.tell(watch, extra_logits, exit_kl)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        kwargs |= {"past_key_values": one_cache(past_key_values, cache), "use_cache": use_cache, "exit_kl": exit_kl}
        kwargs |= {"pondering_steps": pondering_steps, "sequence_steps": sequence_steps}
        kwargs |= {"backward_passes": backward_passes, "refinements": refinements, "return_dict": True}
        inner = self.base_model(input_ids, watch=watch, **kwargs)  # type: ignore[attr-defined]
        seen = {} if watch.targets is None else losses(watch, inner.last_hidden_state, wanted, position_ids)
        if skip_logits is None:
            skip_logits = self.training and watch.targets is not None  # type: ignore[attr-defined]
        if not skip_logits:
            seen["logits"] = watch.readout.last_logits(inner.last_hidden_state, logits_to_keep)
        if extra_logits and watch.ahead is not None:
            seen["extra_logits"] = torch.stack(
                [watch.readout.last_logits(each, logits_to_keep) for each in watch.ahead]
            )
        return self._output(inner, seen, watch.changes(), return_dict)

    def _output(self, inner: Any, seen: dict[str, Any], changes: PassChanges | None, return_dict: bool | None) -> Any:
        """The output of `forward`, from the backbone's and from what was computed of it."""
        stock = {name: seen.pop(name, None) for name in ("loss", "logits")}
        stock |= {name: inner.get(name) for name in (CACHE_NAME, "hidden_states", "attentions")}
        if not (self.config.return_dict if return_dict is None else return_dict):  # type: ignore[attr-defined]
            return CausalLMOutputWithPast(**stock).to_tuple()
        return PonderOutput(**stock, **seen, changes=changes)

    def _prepare_generation_config(self, *arguments: Any, **options: Any) -> Any:
        """Let a `GenerationConfig` set our arguments of `generate`. transformers passes on only its own fields."""
        config, model_arguments = super()._prepare_generation_config(*arguments, **options)  # type: ignore[misc]
        for name in ("pondering_steps", "exit_kl"):
            said = getattr(config, name, getattr(self.generation_config, name, None))  # type: ignore[attr-defined]
            if said is not None:
                model_arguments.setdefault(name, said)
        return config, model_arguments

    def draft(self, pondering_steps: int) -> Any:
        """This model with fewer pondering steps and the same weights: `generate(..., assistant_model=model.draft(0))`.

        The draft proposes tokens, and this model checks several of them in one forward. The text stays the same.
        """
        other = copy.copy(self)
        for name in ("config", "generation_config"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        other.config.pondering_steps = checked_steps(pondering_steps)  # type: ignore[attr-defined]
        other.generation_config.pondering_steps = None  # type: ignore[attr-defined]  # it would override the configuration
        return other

    def draft_heads(self, streamer: Any = None) -> HeadDrafts:
        """Let the extra heads draft: `generate(..., custom_generate=model.draft_heads())`. The text stays the same.

        Args:
            streamer: give it here and not to `generate`, see `speculation.HeadDrafts`.
        """
        if not self.config.extra_heads:  # type: ignore[attr-defined]
            raise ValueError("this model has no extra_heads to draft with; use assistant_model=model.draft(0)")
        return HeadDrafts(streamer)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError. Continuous batching keeps one key-value slot a layer, which the passes would overwrite."""
        raise ValueError(
            "continuous batching is silently wrong for a pondering model: its paged cache has one slot a layer, but "
            "each of the S + 1 passes needs its own; use generate, which takes padded batches"
        )

    # the other entry points of transformers 5
    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module whose weights are not in the folder."""
        if isinstance(module, (HiddenGate, Opening)):
            module.start()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def post_init(self) -> None:
        """Initialize as the published code does, over transformers' own initialization."""
        super().post_init()  # type: ignore[misc]
        if not self._initialized:  # a derived class calls it again, and weights may be loaded by then
            self._init_as_published()
            self._initialized = True

    @torch.no_grad()
    def _init_as_published(self) -> None:
        """Truncated normal (3 sigma) with variance 2 / (5 D). Output projections / sqrt(2 L) or sqrt(2 L (S + 1)).

        Source: LUMIA-Group/PonderingLM, `_init_weights`. Its GPT-NeoX divides by the passes too, the others do not.
        """
        config = self.config  # type: ignore[attr-defined]
        base = math.sqrt(2.0 / (5.0 * config.hidden_size))
        passes = config.pondering_steps + 1 if config.init_by_passes else 1
        done: set[int] = set()
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            # skip a tied head, because it is the table, whose padding row has to stay zero
            if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or id(module.weight) in done:
                continue
            done.add(id(module.weight))
            if isinstance(module, Opening):
                module.start()
                continue
            std = base
            if name.endswith(self.output_projections):
                std = base / math.sqrt(2.0 * config.num_hidden_layers * passes)
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()


class PonderLlamaModel(PonderBackbone, LlamaModel):
    """The backbone of `PonderLlamaForCausalLM`."""

    config_class = PonderLlamaConfig


class PonderLlamaForCausalLM(Ponder, LlamaForCausalLM):
    """LLaMA that ponders."""

    config_class = PonderLlamaConfig
    backbone_class = PonderLlamaModel
    output_projections = ("self_attn.o_proj", "mlp.down_proj")


class PonderOlmo2Model(PonderBackbone, Olmo2Model):
    """The backbone of `PonderOlmo2ForCausalLM`."""

    config_class = PonderOlmo2Config


class PonderOlmo2ForCausalLM(Ponder, Olmo2ForCausalLM):
    """OLMo 2 that ponders."""

    config_class = PonderOlmo2Config
    backbone_class = PonderOlmo2Model
    output_projections = ("self_attn.o_proj", "mlp.down_proj")


class PonderGPT2Model(PonderBackbone, GPT2Model):
    """The backbone of `PonderGPT2LMHeadModel`."""

    config_class = PonderGPT2Config


class PonderGPT2LMHeadModel(Ponder, GPT2LMHeadModel):
    """GPT-2 that ponders. The backbone adds the position embedding again in every pass, so it is not accumulated."""

    config_class = PonderGPT2Config
    backbone_class = PonderGPT2Model
    output_projections = ("attn.c_proj", "mlp.c_proj")
    layers_name, norm_name = "h", "ln_f"


class PonderGPTNeoXModel(PonderBackbone, GPTNeoXModel):
    """The backbone of `PonderGPTNeoXForCausalLM`."""

    config_class = PonderGPTNeoXConfig


class PonderGPTNeoXForCausalLM(Ponder, GPTNeoXForCausalLM):
    """GPT-NeoX (Pythia) that ponders. The head is `lm_head`, which transformers called `embed_out` before 5.1."""

    config_class = PonderGPTNeoXConfig
    backbone_class = PonderGPTNeoXModel
    output_projections = ("attention.dense", "mlp.dense_4h_to_h")
    norm_name = "final_layer_norm"
    _tied_weights_keys = (
        {"lm_head.weight": "gpt_neox.embed_in.weight"}
        if isinstance(GPTNeoXForCausalLM._tied_weights_keys, dict)
        else ["lm_head.weight"]  # before transformers 5
    )

    def __setattr__(self, name: str, value: Any) -> None:
        # Our files use one name for all versions. Under the other name the head would start at random, with a warning.
        super().__setattr__("lm_head" if name == "embed_out" else name, value)

    @property
    def embed_out(self) -> nn.Module:
        """The head, under the name that older stock methods use."""
        return self.lm_head
