"""What `limits` says of attention, tables, engines and versions that no folder of ours leads to; prints JSON.

`python -m tests.serve.stand_ins`, where vLLM is installed.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from vllm.config import ParallelConfig, VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ponder_scale.model.configuration import PonderLlamaConfig
from ponder_scale.serve import limits, parts, plugin

PLAIN = {"layer_name": "layers.0", "sliding_window": None, "has_sink": False}


def said(check: Any, *arguments: Any) -> str:
    """The message with which a check refuses, or ""."""
    try:
        check(*arguments)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def attention(impl: dict[str, Any] | None = None, **changed: Any) -> Any:
    """As vLLM's, with nothing that is refused but what is given."""
    return SimpleNamespace(**{**PLAIN, **changed}, impl=SimpleNamespace(**(impl or {})))


def table(method: Any, bias: Any = None, added: int = 0) -> Any:
    """As vLLM's table or head."""
    return SimpleNamespace(quant_method=method, bias=bias, shard_indices=SimpleNamespace(num_added_elements=added))


def engine(hf: Any = None, **changed: Any) -> Any:
    """As vLLM's configuration of an engine, with nothing that is refused but what is given, by the name of its part."""
    made = {
        "model": {"hf_config": hf or PonderLlamaConfig(), "runner_type": "generate", "quantization": None},
        "parallel": {"pipeline_parallel_size": 1, "use_ubatching": False},
        "cache": {"cache_dtype": "auto"},
    }
    made["model"]["dtype"] = torch.bfloat16
    configs = {f"{part}_config": SimpleNamespace(**{**made[part], **changed.pop(part, {})}) for part in made}
    rest = {"lora_config": None, "quant_config": None, "speculative_config": None, "use_v2_model_runner": False}
    return SimpleNamespace(**configs, **{**rest, **changed})


def heard(check: Callable[..., None], *arguments: Any) -> list[str]:
    """What a check warns of."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    limits.logger.addHandler(handler)
    check(*arguments)
    limits.logger.removeHandler(handler)
    return lines


def warnings(version: str) -> list[str]:
    """What `check_version` warns of under another version."""
    before, vllm.__version__ = vllm.__version__, version
    lines = heard(limits.check_version)
    vllm.__version__ = before
    return lines


class Gated(PonderLlamaConfig):
    """A configuration with a field of a method that the plugin was not told of."""

    def __init__(self, pondering_gate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pondering_gate = pondering_gate


def methods() -> dict[str, str]:
    """What is said of a method that other work has added to the model."""
    before, limits.PONDERING_FIELDS = limits.PONDERING_FIELDS, (*limits.PONDERING_FIELDS, "pondering_gate")
    found = {
        "a method at its default": said(limits.check_configuration, engine(Gated())),
        "a method": said(limits.check_configuration, engine(Gated(pondering_gate=0.5))),
    }
    limits.PONDERING_FIELDS = before
    return found


def versions() -> dict[str, str]:
    """What is said of a vLLM in which one thing is not as it was."""
    found = {}
    shards, attention = limits.VocabParallelEmbeddingShardIndices, limits.Attention
    limits.VocabParallelEmbeddingShardIndices = object  # type: ignore[misc]
    found["without rows"] = said(limits.check_version)
    limits.VocabParallelEmbeddingShardIndices = shards  # type: ignore[misc]
    limits.Attention = type("Attention", (), {"__init__": lambda self, num_heads, head_size, scale: None})
    found["without arguments"] = said(limits.check_version)
    limits.Attention = attention
    decorator, limits.support_torch_compile = limits.support_torch_compile, lambda cls: cls
    found["without dimensions"] = said(limits.check_version)
    limits.support_torch_compile = decorator
    module = sys.modules["vllm.model_executor.layers.attention"]
    del module.Attention
    found["without attention"] = said(importlib.reload, parts)
    module.Attention = attention
    return found


def registered_twice() -> dict[str, Any]:
    """What vLLM knows after two calls of the plugin, and whether they have imported a model."""
    plugin.register()
    plugin.register()
    known = parts.ModelRegistry.get_supported_archs()
    return {"unknown": sorted(set(plugin.STOCK) - set(known)), "models": "ponder_scale.serve.model" in sys.modules}


def main() -> None:
    plain = object.__new__(UnquantizedEmbeddingMethod)
    assert hasattr(ParallelConfig, "use_ubatching") and hasattr(VllmConfig, "use_v2_model_runner")
    found: dict[str, Any] = {
        "plain": said(limits.check_attention, attention()),
        "sinks": said(limits.check_attention, attention(has_sink=True)),
        "window": said(limits.check_attention, attention(sliding_window=64)),
        "alibi": said(limits.check_attention, attention({"alibi_slopes": [0.5]})),
        "soft cap": said(limits.check_attention, attention({"logits_soft_cap": 30.0})),
        "plain table": said(limits.check_tables, table(plain)),
        "quantized table": said(limits.check_tables, table(object())),
        "bias": said(limits.check_tables, table(plain, bias=1)),
        "added rows": said(limits.check_tables, table(plain, added=8)),
        "plain engine": said(limits.check_configuration, engine()),
        "dual batch": said(limits.check_configuration, engine(parallel={"use_ubatching": True})),
        "quiet": heard(limits.check_configuration, engine()),
        "same cache": heard(limits.check_configuration, engine(cache={"cache_dtype": "bfloat16"})),
        "fp8 cache": heard(limits.check_configuration, engine(cache={"cache_dtype": "fp8_e4m3"})),
        "second runner": heard(limits.check_configuration, engine(use_v2_model_runner=True)),
        "extra heads": heard(limits.check_configuration, engine(PonderLlamaConfig(extra_heads=2))),
        "halting": said(limits.check_configuration, engine(PonderLlamaConfig(halting="gate"))),
        **{
            feedback: said(limits.check_configuration, engine(PonderLlamaConfig(feedback=feedback)))
            for feedback in ("embedding", "hidden", "both", "latent", "pause")
        },
        "registered": registered_twice(),
        "this version": warnings(vllm.__version__),
        "next version": warnings("0.33.1"),
        **methods(),
        **versions(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
