"""Runs vLLM on folders, in a process of its own: `python -m tests.serve.engine JOBS.json ANSWERS.json`.

A job is a folder, the arguments of `LLM`, prompts of tokens, and perhaps what to break before. vLLM changes classes of
transformers in its process, so nothing that is compared with it runs here.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
NEW = 24


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, cold and with a warm cache, log-probabilities of text and prompt, and what the engine counted."""
    from vllm import LLM, SamplingParams

    loaded = _count_when_loaded()
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "disable_log_stats": False}
    llm = LLM(model=job["folder"], **{**options, **job["engine"]})
    prompts: Any = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
    first = llm.generate(prompts, SamplingParams(**greedy, logprobs=1), use_tqdm=False)
    second = llm.generate(prompts, SamplingParams(**greedy), use_tqdm=False)
    scored = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    tokens = [list(one.outputs[0].token_ids) for one in first]
    found = {
        "tokens": tokens,
        "logprobs": [
            [place[token].logprob for place, token in zip(one.outputs[0].logprobs, said, strict=True)]
            for one, said in zip(first, tokens, strict=True)
        ],
        "again": [list(one.outputs[0].token_ids) for one in second],
        "cached": [one.num_cached_tokens for one in second],
        "prompt_logprobs": [
            [place[token].logprob for place, token in zip(one.prompt_logprobs[1:], ids[1:], strict=True)]
            for one, ids in zip(scored, job["prompts"], strict=True)
        ],
        "preemptions": sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"),
    }
    if job["engine"].get("tensor_parallel_size", 1) == 1:
        runner = llm.llm_engine.model_executor.driver_worker.model_runner
        found["slots"] = len({cache.data_ptr() for cache in runner.kv_caches})
        found["parameters"] = loaded[-1]
    llm.llm_engine.engine_core.shutdown()
    return found


def _count_when_loaded() -> list[int]:
    """Gets the number of parameters of each model that is loaded; on a CPU, vLLM packs matrices afterwards."""
    from ponder_scale.serve.model import Ponder

    counts, load = [], Ponder.load_weights

    def load_and_count(self: Any, weights: Any) -> set[str]:
        names = load(self, weights)
        counts.append(sum(each.numel() for each in self.parameters()))
        return names

    Ponder.load_weights = load_and_count  # type: ignore[method-assign]
    return counts


def _break(what: str) -> None:
    """Undo one of the cures, to see what it cures."""
    from ponder_scale.serve import model

    if what == "padding":
        model.tokens_of = lambda table: table.weight
    elif what == "compile":
        model.support_torch_compile = lambda **_: lambda cls: cls
    else:
        raise ValueError(what)


def main() -> None:
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    jobs = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        if job.get("break"):
            _break(job["break"])
        try:
            found[name] = answers(job)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[2]).write_text(json.dumps(found))
        if len(jobs) > 1:
            from vllm.distributed import cleanup_dist_env_and_memory

            gc.collect()
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
