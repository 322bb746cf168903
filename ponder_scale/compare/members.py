"""Plan the runs of a comparison: the pondering models of a recipe, and the baselines that they have to beat.

A member is a list of overrides of the recipe, so every run is an ordinary run. All members with the same seed start
from that seed and see the same data in the same order. A longer run continues with the data behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ponder_scale.compare.baselines import EXTRAS, FLOPS, LONG, LONGER, PLAIN, TIME, TWICE, VANILLA
from ponder_scale.config import ModelConfig, RunConfig, TrainConfig
from ponder_scale.errors import ConfigError
from ponder_scale.planning.cost import flops_per_token, steps_to_tokens
from ponder_scale.planning.depth import mean_steps
from ponder_scale.planning.shape import model_shape, run_shape
from ponder_scale.setup.build import model_configuration

EVALUATIONS = 20  # points of a curve if the recipe does not say how often to evaluate


@dataclass(frozen=True)
class Member:
    """A model of the comparison.

    Args:
        about: description for the table.
        overrides: overrides of the recipe, applied after the user's.
        parameters: number of the model's parameters.
        tokens, flops: amounts of its whole training.
        pondering_steps: number that it is trained with.
    """

    name: str
    about: str
    overrides: tuple[str, ...]
    parameters: int
    train: TrainConfig
    tokens: int
    flops: float
    pondering_steps: int = 0

    @property
    def steps(self) -> int:
        """The optimizer steps of its whole training."""
        return self.train.steps

    def share(self, step: int) -> float:
        """The share of its tokens that it has trained on after `step`."""
        return self.train.sequences_until(step) / self.train.sequences_until(self.steps)

    @property
    def ponders(self) -> bool:
        """Whether it is a pondering model, which the baselines are compared with."""
        return self.name.startswith("pondering-")


@dataclass(frozen=True)
class Run:
    """A member with a seed: one training run."""

    member: Member
    seed: int
    run_dir: Path

    @property
    def name(self) -> str:
        """The name of the run for `--only`."""
        return f"{self.member.name}/seed-{self.seed}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """All overrides of this run, in addition to the user's."""
        return (*self.member.overrides, f"seed={self.seed}", f"run_dir={self.run_dir}")


LoadConfig = Callable[[Sequence[str]], RunConfig]


def plan_runs(
    load: LoadConfig,
    *,
    vocab_size: int,
    steps: Sequence[int],
    seeds: Sequence[int],
    extras: Sequence[str],
    own: Mapping[str, Sequence[str]] | None = None,
    time_ratio: float | None = None,
) -> list[Run]:
    """The runs of a comparison, in the order of their members, seed after seed.

    Args:
        load: loads the recipe with the user's overrides and with further ones.
        vocab_size: size of the vocabulary of the shards' tokenizer.
        steps: pondering steps of the pondering models. If empty, the recipe's number.
        seeds: seeds of the runs. If empty, the recipe's seed.
        extras: names of `EXTRAS`.
        own: overrides of single members by name, for example a learning rate that suits one of them.
        time_ratio: training time of the first pondering model over vanilla's. Without it, `vanilla-time` is left out.

    Raises:
        ConfigError: the recipe does not ponder, or a name is not known.
    """
    recipe = load(())
    steps, seeds = list(steps or [recipe.model.pondering_steps]), list(seeds or [recipe.seed])
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown:
        raise ConfigError(f"--with {unknown[0]}: expected one of {', '.join(EXTRAS)}")
    if min(steps) < 1:
        raise ConfigError(f"--steps has {min(steps)}; expected at least 1; vanilla, with 0 steps, is always trained")
    members = _Maker(load, recipe, vocab_size, own or {}, time_ratio).members(steps, extras)
    names = [each.name for each in members]
    if strange := [name for name in own or () if name not in (*names, *extras)]:
        raise ConfigError(f"--for {strange[0]}: expected one of {', '.join(names)}")
    out = Path(recipe.run_dir)
    return [Run(each, seed, out / each.name / f"seed-{seed}") for seed in seeds for each in members]


@dataclass(frozen=True)
class _Maker:
    """Makes the members from a recipe."""

    load: LoadConfig
    recipe: RunConfig
    vocab_size: int
    own: Mapping[str, Sequence[str]]
    time_ratio: float | None

    def members(self, steps: Sequence[int], extras: Sequence[str]) -> list[Member]:
        """The pondering models, the three vanilla ones, and the extras."""
        recipe, train = self.recipe, self.recipe.train
        pondering = [self.member(f"pondering-{s}", f"S = {s}", f"model.pondering_steps={s}") for s in steps]
        vanilla = self.member(VANILLA, "equal parameters and tokens", *PLAIN)
        wider = twice_as_large(recipe.model, self.vocab_size, recipe.data.seq_len)
        twice = self.member(TWICE, "about twice the parameters, equal tokens", *PLAIN, *wider)
        further = train.sequences_until(train.steps) * (pondering[0].flops / vanilla.flops - 1)
        longer = train.steps + round(further / train.global_batch)
        about = f"equal parameters and the training FLOPs of {pondering[0].name}, so more tokens"
        flops = self.member(FLOPS, about, *PLAIN, f"train.steps={longer}")
        more = [
            self.member(name, EXTRAS[name][0], f"model.pondering_steps={steps[0]}", *EXTRAS[name][1])
            for name in extras
            if name not in (LONG, TIME)
        ]
        as_long = None if self.time_ratio is None else max(1, round(self.time_ratio * vanilla.steps))
        for name, many in ((TIME, as_long), (LONG, LONGER * train.steps)):
            if name in extras and many is not None:
                more.append(self.member(name, EXTRAS[name][0], *EXTRAS[name][1], f"train.steps={many}"))
        return [*pondering, vanilla, twice, flops, *more]

    def member(self, name: str, about: str, *overrides: str) -> Member:
        """A member with its size and cost. The overrides of `own` come last, so they win."""
        overrides = (*overrides, *self.own.get(name, ()))
        config = self.load(overrides)
        each = config.evaluate.every_steps or max(1, config.train.steps // EVALUATIONS)
        seq_len = config.data.seq_len
        shape = run_shape(config, _configuration(config.model, self.vocab_size, seq_len))
        tokens = steps_to_tokens(config)
        each_token = flops_per_token(shape, config.train.recompute, mean_steps(config), config.train.pass_losses)
        flops = tokens * each_token.model
        overrides = (*overrides, f"evaluate.every_steps={each}")
        steps = config.model.pondering_steps
        return Member(name, about, overrides, shape.parameters, config.train, tokens, flops, steps)


def twice_as_large(model: ModelConfig, vocab_size: int, seq_len: int) -> list[str]:
    """Overrides that make a model with about twice the parameters: wider and deeper, with heads as wide as before.

    Shapes with up to twice the width and twice the layers are compared, and the nearest in size is taken. Of shapes
    that are equally near (within 3%), the one whose ratio of width to depth is nearest to the model's is taken.
    """
    head = model.hidden_size // model.num_attention_heads
    group = model.num_attention_heads // (model.num_key_value_heads or model.num_attention_heads)
    target = 2 * _parameters(model, vocab_size, seq_len, {})
    best: tuple[tuple[int, float], list[str]] | None = None
    for heads in range(model.num_attention_heads, 2 * model.num_attention_heads + 1, group):
        values = {"num_attention_heads": heads, "hidden_size": heads * head}
        values["intermediate_size"] = round(model.intermediate_size * heads / model.num_attention_heads / 8) * 8
        if model.num_key_value_heads is not None:
            values["num_key_value_heads"] = heads // group
        one, two = (_parameters(model, vocab_size, seq_len, {**values, "num_hidden_layers": n}) for n in (1, 2))
        for layers in range(model.num_hidden_layers, 2 * model.num_hidden_layers + 1):
            off = abs(math.log((one + (layers - 1) * (two - one)) / target))
            slant = abs(math.log(heads / model.num_attention_heads * model.num_hidden_layers / layers))
            rank = (int(off / 0.03), slant)
            if best is None or rank < best[0]:
                best = rank, [f"model.{key}={value}" for key, value in {**values, "num_hidden_layers": layers}.items()]
    assert best is not None
    return best[1]


def _parameters(model: ModelConfig, vocab_size: int, seq_len: int, values: dict[str, Any]) -> int:
    changed = ModelConfig(**{**vars(model), **values})
    return model_shape(_configuration(changed, vocab_size, seq_len), seq_len).parameters


def _configuration(model: ModelConfig, vocab_size: int, seq_len: int) -> Any:
    return model_configuration(model, vocab_size=vocab_size, seq_len=seq_len, eod_id=0)
