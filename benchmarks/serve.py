"""`python -m benchmarks serve` compares the time of `transformers.generate` and vLLM for one folder, in one process.

transformers runs a batch until its longest text is done, and pads the prompts to one length. vLLM starts a new request
when another ends. At equal lengths the ratio therefore compares two engines. At mixed lengths it also compares two ways
of batching. Runs of the two alternate, so that other work on the machine slows both.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import check_numbers, device_name
from ponder_scale.errors import ConfigError
from ponder_scale.planning.serving import token_bytes
from ponder_scale.setup.device import default_device

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8}
VOCABULARY, STEPS = 32000, 3
# for other models vLLM patches classes of transformers, so transformers has to run first
NATIVE = ("ponder_llama", "ponder_gpt2")
Work = list[tuple[list[int], int]]  # prompts, each with the number of tokens to generate
Key = tuple[int, str]  # requests at a time, and "equal" or "mixed" lengths
Way = Callable[[Work], list[list[int]]]
Timed = tuple[list[float], list[list[int]]]  # seconds of each run, and the generated tokens


def run(
    folder: Path | None, *, batches: list[int], prompt: int, new: int, runs: int, threads: int, eager: bool
) -> list[dict[str, Any]]:
    """Measure, print the table, and return its rows.

    Args:
        folder: an exported one; None: one of width 256 is made.
        prompt, new: tokens; the most, where lengths are mixed, of a quarter and more.
        eager: without compilation in vLLM.

    Raises:
        ConfigError: vLLM is not installed here.
        RuntimeError: the engines do not say the same at equal lengths in fp32.
    """
    check_numbers(prompt_tokens=prompt, new_tokens=new, runs=runs, threads=threads)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as made:
        folder = _small_folder(Path(made, "model")) if folder is None else folder
        return _measure(folder, batches, prompt, new, runs, threads, eager)


def _small_folder(out: Path) -> Path:
    from ponder_scale.export.folder import write_folder
    from ponder_scale.model.configuration import PonderLlamaConfig
    from ponder_scale.model.modeling import PonderLlamaForCausalLM

    torch.manual_seed(0)
    fields = {"vocab_size": VOCABULARY, "pondering_steps": STEPS, "max_position_embeddings": 1024}
    model = PonderLlamaForCausalLM(PonderLlamaConfig(**SHAPE, **fields, scale_embeds=True))
    write_folder(out, model.config, model.named_parameters(), dtype="float32", card=str, tokenizer=None)
    return out


def _measure(
    folder: Path, batches: list[int], prompt: int, new: int, runs: int, threads: int, eager: bool
) -> list[dict[str, Any]]:
    from ponder_scale.evaluate.trust import installed_configuration
    from ponder_scale.setup.build import model_class

    device, configuration = default_device(), installed_configuration(folder)
    model = model_class(configuration).from_pretrained(folder, config=configuration, local_files_only=True)
    model = model.to(device).eval()
    config, dtype = model.config, model.dtype
    works = {
        (batch, lengths): _work(config.vocab_size, batch, prompt, new, lengths == "mixed")
        for batch in batches
        for lengths in ("equal", "mixed")
    }
    engine = cache(partial(_engine, folder, dtype, prompt + new, max(batches), eager))
    ways = (partial(_transformers, model), lambda work: _vllm(engine(), work))
    theirs, ours = _timed(ways, works, runs, in_turn=config.model_type in NATIVE)
    rows = []
    for key, work in works.items():
        (slow, texts), (fast, said) = theirs[key], ours[key]
        if key[1] == "equal" and dtype == torch.float32 and device == "cpu" and texts != said:
            raise RuntimeError(f"transformers and vLLM answer a batch of {key[0]} differently")
        ratio = statistics.median(one / other for one, other in zip(slow, fast, strict=True))
        tokens_s = sum(count for _, count in work) / statistics.median(fast)
        rows.append({"batch": key[0], "lengths": key[1], "ratio": ratio, "tokens_s": tokens_s})
    print(
        f"serving, S = {config.pondering_steps}: width {config.hidden_size}, {config.num_hidden_layers} layers, "
        f"vocabulary {config.vocab_size:,}, {str(dtype).removeprefix('torch.')}; prompts of {prompt} tokens and {new} "
        f"new ones at most; {device_name(device, threads)}; medians of {runs} runs"
    )
    print(f"{'batch':>6s} {'lengths':>8s} {'transformers / vLLM':>20s} {'tokens/s in vLLM':>17s}")
    for row in rows:
        print(f"{row['batch']:6d} {row['lengths']:>8s} {row['ratio']:20.2f} {row['tokens_s']:17.0f}")
    held, counted = _cache_bytes(engine()), token_bytes(config, width=dtype.itemsize)
    print(f"key-value cache: {held:,.0f} bytes a token held, {counted:,} by arithmetic")
    return rows


def _timed(ways: tuple[Way, Way], works: dict[Key, Work], runs: int, *, in_turn: bool) -> list[dict[Key, Timed]]:
    """For each way and work, the seconds of each run and the generated tokens. One warm-up run comes first.

    Args:
        in_turn: alternate the two ways. Otherwise all runs of the first way come first.
    """
    turns = (ways,) if in_turn else tuple((way,) for way in ways)
    found: dict[Way, dict[Key, Timed]] = {way: {} for way in ways}
    for turn in turns:
        for key, work in works.items():
            for number in range(runs + 1):
                for way in turn:
                    begun = time.perf_counter()
                    said = way(work)
                    seconds = time.perf_counter() - begun
                    before, _ = found[way].get(key, ([], said))
                    found[way][key] = ([*before, seconds] if number else [], said)
    return list(found.values())


def _work(vocabulary: int, batch: int, prompt: int, new: int, mixed: bool) -> Work:
    generator = torch.Generator().manual_seed(batch)

    def length(most: int) -> int:
        least = max(1, most // 4) if mixed else most
        return int(torch.randint(least, most + 1, (), generator=generator))

    return [
        (torch.randint(1, vocabulary, (length(prompt),), generator=generator).tolist(), length(new))
        for _ in range(batch)
    ]


def _transformers(model: Any, work: Work) -> list[list[int]]:
    longest = max(len(ids) for ids, _ in work)
    padding = [longest - len(ids) for ids, _ in work]
    given = torch.tensor([[0] * pad + ids for pad, (ids, _) in zip(padding, work, strict=True)], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=model.device)
    most = max(count for _, count in work)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(given, attention_mask=mask, max_new_tokens=most, **options)[:, longest:]
    return [row[:count].tolist() for row, (_, count) in zip(said, work, strict=True)]


def _engine(folder: Path, dtype: torch.dtype, length: int, batch: int, eager: bool) -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(f"bench serve needs vLLM ({error}); see docs/serving.md, or run `make test-vllm`") from error
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=length,
        max_num_seqs=batch,
        enforce_eager=eager,
        enable_prefix_caching=False,  # because the same prompts are sent again
    )


def _vllm(engine: Any, work: Work) -> list[list[int]]:
    from vllm import SamplingParams

    prompts: Any = [{"prompt_token_ids": ids} for ids, _ in work]
    wishes = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for _, count in work]
    return [list(one.outputs[0].token_ids) for one in engine.generate(prompts, wishes, use_tqdm=False)]


def _cache_bytes(engine: Any) -> float:
    """Bytes that vLLM allocates per token, over all layers and passes."""
    runner = engine.llm_engine.model_executor.driver_worker.model_runner
    config = engine.llm_engine.vllm_config.cache_config
    return sum(cache.nbytes for cache in runner.kv_caches) / (config.num_gpu_blocks * config.block_size)
