"""Refuse what is not served, with one sentence each, and check that this vLLM has what serving needs.

A pass that attends to another pass's keys changes the text without an error. So does a softmax over rows that are not
tokens. Therefore every setting that was not tested is refused here by name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
import vllm

from ponder_scale.model.configuration import PONDERING_FIELDS
from ponder_scale.serve.parts import (
    TESTED,
    Attention,
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VllmConfig,
    VocabParallelEmbedding,
    VocabParallelEmbeddingShardIndices,
    support_torch_compile,
    unfit,
)

# The fields of a folder's configuration that `model.py` uses. `init_by_passes` only affects training, and the extra
# heads are left out.
SERVED_FIELDS = frozenset(
    {
        *("pondering_steps", "scale_embeds", "initial_scale", "pondering_temperature", "feedback", "residual"),
        *("pondering_top_k", "init_by_passes", "extra_heads"),
    }
)
SERVED_RESIDUALS, SERVED_FEEDBACKS = ("accumulate", "restart", "replace"), ("embedding", "hidden")
# Draft methods that need no model. All others need key-value slots of their own.
PLAIN_DRAFTS = ("ngram", "ngram_gpu", "suffix")
ATTENTION_ARGUMENTS = ("num_heads", "head_size", "scale", "num_kv_heads", "cache_config", "prefix")
SHARD_FIELDS = ("num_org_elements", "num_added_elements")

logger = logging.getLogger("vllm.ponder_scale")  # a child of vLLM's logger, so that vLLM's handler prints its messages


def check_version() -> None:
    """Warn if this minor version of vLLM was not tested.

    Raises:
        RuntimeError: this vLLM lacks something that serving needs. The message names it.
    """
    broken = list(_broken_assumptions())
    if broken:
        raise unfit("; ".join(broken))
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED:
        logger.warning(
            "pondering models were tested with vLLM %s, and this is %s; compare some greedy answers with those of "
            "transformers before you rely on it",
            ", ".join(TESTED),
            vllm.__version__,
        )


def _broken_assumptions() -> Iterator[str]:
    attention = inspect.signature(Attention.__init__).parameters
    for name in ATTENTION_ARGUMENTS:
        if name not in attention:
            yield f"its Attention takes no {name}"
    for name in SHARD_FIELDS:
        if not hasattr(VocabParallelEmbeddingShardIndices, name):
            yield f"its shard indices of the vocabulary have no {name}"
    if "dynamic_arg_dims" not in inspect.signature(support_torch_compile).parameters:
        yield "its support_torch_compile takes no dynamic_arg_dims"
    if not hasattr(VllmConfig, "with_hf_config"):
        yield "its VllmConfig has no with_hf_config"


def check_configuration(config: VllmConfig) -> None:
    """Raise ValueError for a setting of the engine or of the model that is not served. Warn of lossy or untested
    ones.
    """
    hf = config.model_config.hf_config
    hf.check_pondering()  # `--hf-overrides` sets fields after the configuration was created
    for what in (*_refused_fields(hf), *_refused_settings(config)):
        raise ValueError(f"pondering models are not served with {what}")
    cache = str(config.cache_config.cache_dtype)
    if cache != "auto" and _narrower(cache, config.model_config.dtype):
        logger.warning(
            "the key-value cache of %s is lossy: each pass reads it and feeds the error to the next, and greedy text "
            "was seen to change; use --kv-cache-dtype auto to keep the dtype of the model",
            cache,
        )
    if hf.extra_heads:
        logger.warning(
            "the %d extra heads of this model are left out, because they only draft and the plugin has no drafts of "
            "theirs; the text is the same without them",
            hf.extra_heads,
        )
    if getattr(config, "use_v2_model_runner", False):
        logger.warning(
            "pondering models were tested with vLLM's first model runner, but this is the second; compare some greedy "
            "answers with those of transformers, or set VLLM_USE_V2_MODEL_RUNNER=0"
        )


def _narrower(cache: str, dtype: torch.dtype) -> bool:
    of_cache = getattr(torch, cache, None)
    return not isinstance(of_cache, torch.dtype) or of_cache.itemsize < dtype.itemsize or of_cache.itemsize < 2


def _refused_fields(hf: Any) -> Iterator[str]:
    values = hf.to_dict()
    for field in PONDERING_FIELDS:
        if field not in SERVED_FIELDS and getattr(hf, field) != getattr(type(hf)(), field):
            yield f"{field}, which changes what the model computes in a way that the plugin does not know"
    for field in values:
        if "ponder" in field and field not in PONDERING_FIELDS:
            yield f"{field}, which is not one of their fields; expected some of {', '.join(sorted(SERVED_FIELDS))}"
    if hf.residual not in SERVED_RESIDUALS:
        yield f"the residual {hf.residual!r}; expected one of {', '.join(SERVED_RESIDUALS)}"
    if hf.feedback not in SERVED_FEEDBACKS:
        yield f"the feedback {hf.feedback!r}; expected one of {', '.join(SERVED_FEEDBACKS)}"


def _refused_settings(config: VllmConfig) -> Iterator[str]:
    parallel, drafts = config.parallel_config, config.speculative_config
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism, since a token goes through all layers S + 1 times; use tensor parallelism"
    if getattr(parallel, "use_ubatching", False):
        yield "dual batch overlap, since its threads would switch each other's passes"
    if config.lora_config is not None:
        yield "LoRA adapters; merge the adapter into the weights and export them"
    if config.quant_config is not None or config.model_config.quantization is not None:
        yield "quantized weights, since the feedback reads head and table as they are; use bfloat16 or float16"
    if config.model_config.runner_type == "pooling":
        yield "a pooling runner; they generate only"
    if drafts is not None and drafts.method not in PLAIN_DRAFTS:
        yield f"the draft method {drafts.method!r}; use one that drafts without a model: {', '.join(PLAIN_DRAFTS)}"


def check_attention(attention: Attention) -> None:
    """Raise ValueError unless the layer has full causal attention with its own keys, because each pass gets a copy of
    it.
    """
    impl = attention.impl
    refused = {
        "a sliding window": attention.sliding_window is not None,
        "attention sinks": attention.has_sink,
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "a soft cap of attention scores": bool(getattr(impl, "logits_soft_cap", None)),
        "keys and values of another layer": getattr(attention, "kv_sharing_target_layer_name", None) is not None,
        "attention that is not causal": getattr(attention, "attn_type", "decoder") != "decoder",
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"pondering models are not served with {what}, which {attention.layer_name} has")


def check_tables(*tables: VocabParallelEmbedding) -> None:
    """Raise ValueError unless head and table are unquantized rows of the vocabulary, without a bias or added rows."""
    for table in tables:
        name = "head" if isinstance(table, ParallelLMHead) else "embedding table"
        if type(table.quant_method) is not UnquantizedEmbeddingMethod:
            raise ValueError(f"pondering models are not served with a quantized {name}; keep it in the model's dtype")
        if getattr(table, "bias", None) is not None:
            raise ValueError(f"pondering models are not served with a bias in the {name}; they have none")
        if table.shard_indices.num_added_elements:
            raise ValueError(f"pondering models are not served with rows added to the {name}, as those of LoRA are")
