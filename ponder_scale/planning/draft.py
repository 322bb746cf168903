"""A first recipe for the shards at hand, with a comment on each key: `ponder-scale init`.

The size of the model, the batch and the learning rate are common starting points, not the best ones for your data. Each
stands in the recipe as a plain number that you can change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.figures import count
from ponder_scale.shards.format import ShardSet
from ponder_scale.shards.manifest import PACKING_PREFIX

TOKENS_A_PARAMETER = 20  # that train a model at the least FLOPs: arXiv 2203.15556, table A3
HEAD_WIDTH = 64
WIDEST = 2560  # of the shipped recipes: beyond, you know better
MOST_BATCH_TOKENS = 2**19  # of the shipped LLaMA recipes
STEPS_WISHED = 2000  # a smaller corpus takes a smaller batch
# up to this number of parameters, this peak learning rate, as in the shipped recipes
RATES = ((20e6, 2e-3), (100e6, 1e-3), (250e6, 6e-4), (600e6, 3e-4), (1e9, 2.5e-4), (2e9, 2e-4), (math.inf, 1.6e-4))
# keys that a run often needs next: they stand in the recipe as comments, with their defaults
NEXT = {
    "model": ("tie_word_embeddings", "pondering_temperature", "pondering_top_k"),
    "train": ("deepspeed", "time_limit", "compile"),
    "checkpoint": ("keep", "asynchronous"),
    "evaluate": ("tasks",),
    "health": ("on_spike",),
    "log": ("wandb",),
}


@dataclass(frozen=True)
class Draft:
    """A recipe as text, and what it trains in a sentence."""

    text: str
    summary: str


def draft(sources: Mapping[str, ShardSet], *, pondering_steps: int, gpu: bool, run_dir: str) -> Draft:
    """The recipe for about one epoch of `sources`, by name, in their proportions.

    Args:
        gpu: whether it will train on GPUs, which take bf16 and longer sequences.

    Raises:
        ConfigError: the shards have too few tokens for a training step.
    """
    tokens = {name: shards.manifest.tokens("train") for name, shards in sources.items()}
    total, packed = sum(tokens.values()), _packed(sources)
    seq_len = packed or (2048 if gpu else 256)
    wanted = max(1.0, min(MOST_BATCH_TOKENS, total / STEPS_WISHED) / seq_len)
    sequences = max(8, 2 ** round(math.log2(wanted)))
    steps = total // (sequences * seq_len)
    if not steps:
        raise ConfigError(
            f"the shards have {total:,} tokens; expected at least {sequences * seq_len:,}, one training step of "
            f"{sequences} sequences of {seq_len}"
        )
    width, layers, parameters = _shape(total, next(iter(sources.values())).manifest.vocab_size)
    rate = next(rate for most, rate in RATES if parameters <= most)
    model = {"architecture": "llama", "hidden_size": width, "intermediate_size": _intermediate(width)}
    model |= {"num_hidden_layers": layers, "num_attention_heads": width // HEAD_WIDTH}
    train = {"steps": steps, "global_batch": sequences, "micro_batch": "auto"}
    places = {name: str(shards.folder.absolute()) for name, shards in sources.items() if tokens[name]}
    often = {"every_steps": max(1, round(steps / 20))}
    values: dict[str, Any] = {
        "run_dir": run_dir,
        "model": {**model, "pondering_steps": pondering_steps, "scale_embeds": True},
        "data": {
            "seq_len": seq_len,
            **({"packing": "best-fit", "document_mask": True} if packed else {}),
            "sources": {name: {"path": place, "weight": tokens[name]} for name, place in places.items()},
        },
        "train": {**train, "precision": "bf16" if gpu else "fp32", "recompute": "auto"},
        "optim": {"lr": rate, "min_lr": rate / 10, "warmup_steps": max(1, round(steps / 50))},
        "checkpoint": often,
        "evaluate": often if any(shards.manifest.tokens("heldout") for shards in sources.values()) else {},
    }
    summary = (
        f"a LLaMA of {count(parameters)} parameters with S = {pondering_steps}, {steps:,} steps of "
        f"{count(sequences * seq_len)} tokens, about one epoch of {count(total)} tokens"
    )
    return Draft("\n".join([*_head(list(sources), summary), *_lines(RunConfig, values, "")]) + "\n", summary)


def _head(names: list[str], summary: str) -> list[str]:
    return [
        f"# A first recipe for {', '.join(names)}: {summary}.",
        f"# The size is a starting point, {TOKENS_A_PARAMETER} tokens a parameter. A key behind a # has its default.",
    ]


def _packed(sources: Mapping[str, ShardSet]) -> int | None:
    """The longest sequence length that every source is packed for."""
    lengths = [
        {int(path.name.removeprefix(PACKING_PREFIX)) for path in shards.folder.glob(f"{PACKING_PREFIX}*")}
        for shards in sources.values()
    ]
    return max(set.intersection(*lengths), default=None)


def _intermediate(width: int) -> int:
    """Two thirds of four widths, as LLaMA has it, in multiples of 16."""
    return math.ceil(width * 8 / 3 / 16) * 16


def _shape(tokens: int, vocabulary: int) -> tuple[int, int, int]:
    """Width, layers and parameters of the largest model that `tokens` are enough for; a layer for each head's width."""
    best = None
    for width in range(HEAD_WIDTH, WIDEST + 1, HEAD_WIDTH):
        layers = max(2, width // HEAD_WIDTH)
        parameters = 2 * vocabulary * width + layers * (4 * width**2 + 3 * width * _intermediate(width) + 2 * width)
        parameters += width
        if best is None or parameters * TOKENS_A_PARAMETER <= tokens:
            best = width, layers, parameters
    assert best is not None
    return best


def _lines(schema: Any, values: Mapping[str, Any], indent: str, group: str = "") -> list[str]:
    """YAML of the values in the order of the schema, each key below what its knob says of it."""
    lines: list[str] = []
    kinds = get_type_hints(schema)
    for item in fields(schema):
        kind, given = kinds[item.name], item.name in values
        if is_dataclass(kind):
            inner = _lines(kind, values.get(item.name, {}), indent + "  ", item.name)
            mark = "" if values.get(item.name) else "# "
            lines += ["", f"{indent}{mark}{item.name}:", *inner] if inner else []
        elif given or item.name in NEXT.get(group, ()):
            lines.append(f"{indent}# {item.metadata['help']}")
            value = values[item.name] if given else getattr(schema(), item.name)
            lines += [f"{indent}{'' if given else '# '}{line}" for line in _yaml(item.name, value)]
    return lines


def _yaml(name: str, value: Any) -> list[str]:
    return yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1000).splitlines()


def source_names(folders: list[Path]) -> dict[str, Path]:
    """A name for each folder: its own, or with its parent's where that is needed to tell two apart.

    Raises:
        ConfigError: a folder is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a folder of shards is given twice; give each once")
    plain = [folder.resolve().name for folder in folders]
    names: dict[str, Path] = {}
    for folder, name in zip(folders, plain, strict=True):
        unique = name if plain.count(name) == 1 else f"{folder.resolve().parent.name}-{name}"
        if unique in names:
            raise ConfigError(f"{folder} and {names[unique]} would both be called {unique}; rename a folder")
        names[unique] = folder
    return names
