"""The parts of vLLM that serving needs. If a version of vLLM has moved one, the error names that part."""

from __future__ import annotations

import vllm

TESTED = ("0.32",)  # tested minor versions of vLLM


def unfit(reasons: str) -> RuntimeError:
    return RuntimeError(
        f"vLLM {vllm.__version__} cannot serve pondering models: {reasons}; install vLLM {TESTED[-1]}, or a release of "
        "ponder-scale that was tested with this one"
    )


try:
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import VllmConfig
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_gather,
        tensor_model_parallel_all_reduce,
    )
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
        VocabParallelEmbeddingShardIndices,
    )
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.model_executor.models.utils import extract_layer_index
except ImportError as error:
    raise unfit(str(error)) from error

__all__ = [
    "TESTED",
    "Attention",
    "ModelRegistry",
    "ParallelLMHead",
    "UnquantizedEmbeddingMethod",
    "VllmConfig",
    "VocabParallelEmbedding",
    "VocabParallelEmbeddingShardIndices",
    "extract_layer_index",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "support_torch_compile",
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "unfit",
]
