"""The pondering recurrence over the class with which vLLM serves the stock architecture.

There is one set of weights, but (S + 1) x L instances of `Attention`, each with its own key-value slot. Layer i of pass
s has the slot s * L + i. vLLM compiles its inner models once and drops the guards of the compiler. A loop around such a
model would therefore run every pass with the slots of the first. Here vLLM compiles the outermost class instead. The
whole recurrence is one graph, in which each pass has its own code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ponder_scale.model.configuration import PONDERING_FIELDS
from ponder_scale.model.ponder import ponder
from ponder_scale.serve.feedback import Mixing, mix, mix_parts
from ponder_scale.serve.limits import check_attention, check_configuration, check_tables, check_version
from ponder_scale.serve.parts import (
    Attention,
    ModelRegistry,
    ParallelLMHead,
    VllmConfig,
    VocabParallelEmbedding,
    extract_layer_index,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    support_torch_compile,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from ponder_scale.serve.plugin import STOCK
from ponder_scale.serve.weights import Tensors


class _TensorParallel:
    """The ranks among which vLLM splits the vocabulary."""

    gather = staticmethod(tensor_model_parallel_all_gather)
    sum = staticmethod(tensor_model_parallel_all_reduce)


@torch.library.custom_op("ponder_scale::serve_feedback", mutates_args=())
def _feedback(
    hidden: Tensor,
    head: Tensor,
    table: Tensor,
    temperature: float,
    scale: float,
    top_k: int | None,
    part: int,
    vocabulary: int,
) -> Tensor:
    """The pondering embedding as one node of the graph, so that the compiler does not unroll its blocks."""
    mixing = Mixing(temperature, scale, top_k)
    if get_tensor_model_parallel_world_size() == 1:
        return mix(hidden, head, table, mixing)
    rank = get_tensor_model_parallel_rank()
    return mix_parts(hidden, head, table, mixing, ranks=_TensorParallel(), rank=rank, part=part, vocabulary=vocabulary)


@_feedback.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden)


class PassAttention(nn.Module):
    """The attention of one layer in every pass. `Ponder.forward` selects the pass."""

    def __init__(self, passes: list[Attention]) -> None:
        super().__init__()
        self.passes = nn.ModuleList(passes)
        self.index = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the `Attention` of the selected pass."""
        return self.passes[self.index](*args, **kwargs)


def tokens_of(table: VocabParallelEmbedding) -> Tensor:
    """The rows that stand for tokens, without the rows of zeros that vLLM adds, whose logit 0 belongs to no token."""
    return table.weight[: table.shard_indices.num_org_elements]


def stock_configuration(hf: Any) -> Any:
    """The configuration of the stock architecture, a class of transformers."""
    left_out = (*PONDERING_FIELDS, "model_type", "auto_map", "architectures")
    values = {key: value for key, value in hf.to_dict().items() if key not in left_out}
    return AutoConfig.for_model(hf.model_type.removeprefix("ponder_"), **values)


class Ponder:
    """A mixin that adds pondering to one of vLLM's causal language models."""

    supports_lora = supports_pp = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_version()
        check_configuration(vllm_config)
        self.pondering = hf = vllm_config.model_config.hf_config
        stock = stock_configuration(hf)
        engine = vllm_config.with_hf_config(stock, [STOCK[type(self).__name__][0]])
        super().__init__(vllm_config=engine, prefix=prefix)  # type: ignore[call-arg]
        self.tensors: Tensors | None = Tensors(stock, ("extra_heads.",) if hf.extra_heads else ())
        self.switches = self._switches(vllm_config)
        modules = list(self.modules())  # type: ignore[attr-defined]
        tables = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
        assert len(tables) == 1, tables
        self.ends = (self.lm_head, tables[0])  # type: ignore[attr-defined]  # in a tuple, which registers no module again
        check_tables(*self.ends)
        self.embed_scale = math.sqrt(hf.hidden_size) if hf.scale_embeds else 1.0

    def _switches(self, config: VllmConfig) -> list[PassAttention]:
        """Replace the attention of each layer by a `PassAttention`, and return these."""
        found = [
            (parent, name)
            for parent in list(self.modules())  # type: ignore[attr-defined]
            for name, child in list(parent.named_children())
            if isinstance(child, Attention)
        ]
        assert len(found) == self.pondering.num_hidden_layers, len(found)
        switches = []
        for parent, name in found:
            first = getattr(parent, name)
            check_attention(first)
            more = [self._another(first, index, config) for index in range(1, self.pondering.pondering_steps + 1)]
            switches.append(PassAttention([first, *more]))
            setattr(parent, name, switches[-1])
        return switches

    def _another(self, first: Attention, index: int, config: VllmConfig) -> Attention:
        """A copy of the attention for the key-value slot of pass `index`. vLLM finds the slot by the copy's name."""
        layer = extract_layer_index(first.layer_name)
        slot = index * self.pondering.num_hidden_layers + layer
        return Attention(
            num_heads=first.num_heads,
            head_size=first.head_size,
            scale=first.impl.scale,
            num_kv_heads=first.num_kv_heads,
            cache_config=config.cache_config,
            prefix=first.layer_name.replace(f".{layer}.", f".{slot}."),
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights as vLLM does. The first call must bring all tensors, later calls may bring some, as trainers
        do.

        Raises:
            ValueError: the folder lacks tensors or has unknown ones.
        """
        if self.tensors is None:
            return super().load_weights(weights)  # type: ignore[misc]
        loaded = super().load_weights(self.tensors.noted(weights))  # type: ignore[misc]
        self.tensors.check_complete()
        self.tensors = None
        return loaded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The hidden states of the last pass, (N, D), for the N tokens of all requests, one request after the other."""
        hf = self.pondering
        head, table = (tokens_of(end) for end in self.ends)

        def run_pass(e: Tensor, index: int) -> Tensor:
            for switch in self.switches:
                switch.index = index
            return super(Ponder, self).forward(None, positions, None, e, **kwargs)  # type: ignore[misc]

        def feedback(hidden: Tensor, index: int) -> Tensor:
            if hf.feedback == "hidden":
                return hidden
            return torch.ops.ponder_scale.serve_feedback(
                hidden,
                head,
                table,
                hf.pondering_temperature,
                self.embed_scale,
                hf.pondering_top_k,
                self.ends[1].num_embeddings_per_partition,
                hf.vocab_size,
            )

        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[attr-defined]
        if self.embed_scale * hf.initial_scale != 1.0:
            embeds = embeds * (self.embed_scale * hf.initial_scale)
        return ponder(run_pass, feedback, embeds, hf.pondering_steps, hf.residual)


def _served(name: str) -> type:
    """The pondering class over the class that this vLLM uses for the stock one: its own, or one that wraps
    transformers'.
    """
    base = ModelRegistry.models[STOCK[name][0]].load_model_cls()
    cls = type(name, (Ponder, base), {"__module__": __name__})
    dims = {"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
    return support_torch_compile(dynamic_arg_dims=dims)(cls)


def __getattr__(name: str) -> type:
    if name in STOCK:
        globals()[name] = _served(name)
        return globals()[name]
    raise AttributeError(name)
