"""What `limits` says of attention, tables and versions that no folder of ours leads to; prints JSON.

`python -m tests.serve.stand_ins`, where vLLM is installed.
"""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbeddingShardIndices,
)

from ponder_scale.serve import limits

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


def warnings(version: str) -> list[str]:
    """What `check_version` warns of under another version."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    limits.logger.addHandler(handler)
    before, vllm.__version__ = vllm.__version__, version
    limits.check_version()
    vllm.__version__ = before
    limits.logger.removeHandler(handler)
    return heard


def main() -> None:
    plain = object.__new__(UnquantizedEmbeddingMethod)
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
        "this version": warnings(vllm.__version__),
        "next version": warnings("0.33.1"),
    }
    del VocabParallelEmbeddingShardIndices.num_org_elements
    found["without rows"] = said(limits.check_version)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
