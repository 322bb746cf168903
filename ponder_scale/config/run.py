"""A whole run: every group of knobs, and the conditions between the groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ponder_scale.errors import ConfigError
from ponder_scale.files.shipped import RECIPES
from ponder_scale.settings import MISSING, find_recipe, knob, load

from .data import DataConfig
from .model import INTERLEAVED, ModelConfig
from .train import OptimConfig, TrainConfig
from .watch import CheckpointConfig, EvaluateConfig, HealthConfig, LogConfig


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    run_dir: str = knob(
        MISSING,
        "Folder for everything the run writes. The folder is the identity of the run: the same folder resumes it.",
        path=True,
    )
    seed: int = knob(
        1, "Seed of the initial weights, the data order, random pondering steps and dropout.", min=0, max=2**31 - 1
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.optim.warmup_steps > self.train.steps:
            raise ConfigError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, more than train.steps ({self.train.steps}); lower it"
            )
        if self.health.on_spike == "rewind" and not (self.checkpoint.every_steps or self.checkpoint.every_minutes):
            raise ConfigError(
                "health.on_spike is rewind, but the run saves no checkpoint to go back to; set checkpoint.every_steps "
                "or checkpoint.every_minutes"
            )
        decay = self.optim.wsd_decay_steps
        if decay is not None and decay > self.train.steps - self.optim.warmup_steps:
            raise ConfigError(
                f"optim.wsd_decay_steps is {decay}, more than the {self.train.steps - self.optim.warmup_steps} steps "
                "after warm-up; lower it"
            )
        self._check_pondering()
        self._check_halting()
        self._check_heads()
        self._check_interleaved()
        if self.train.offload_activations and self.train.recompute == "none":
            raise ConfigError(
                "train.offload_activations is true, but train.recompute is none, which keeps every activation; use "
                "another train.recompute"
            )
        if not self.data.sources:
            raise ConfigError("data.sources is empty; name a folder of shards: data.sources.NAME.path=FOLDER")

    def _check_halting(self) -> None:
        if (self.train.pass_losses == "exit") != (self.model.halting == "exit"):
            raise ConfigError(
                f"train.pass_losses is {self.train.pass_losses} with model.halting {self.model.halting}; the gates of "
                "exit learn by that loss alone, so set both to exit, or neither"
            )
        if self.model.halting == "exit" and self.optim.z_loss:
            raise ConfigError(
                f"optim.z_loss is {self.optim.z_loss} with model.halting exit, whose loss has no z-loss; set it to 0"
            )
        if self.model.halting == "none":
            return
        pondering = self.train.pondering
        for name, value in (("per", pondering.per), ("backward_passes", pondering.backward_passes)):
            if value not in (None, "step"):
                raise ConfigError(
                    f"train.pondering.{name} is {value} with model.halting {self.model.halting}: each decides how deep "
                    f"a token goes; leave train.pondering.{name} at its default"
                )
        if self.train.compile:
            raise ConfigError(
                f"train.compile is true with model.halting {self.model.halting}, whose layers are not compiled: the "
                "keys and values that halted tokens keep change from pass to pass; set train.compile=false"
            )

    def _check_heads(self) -> None:
        heads = self.model.extra_heads
        if heads and self.model.halting != "none":
            raise ConfigError(
                f"model.extra_heads is {heads} with model.halting {self.model.halting}: the heads read the last pass, "
                "in which halted tokens have no state of their own; set extra_heads to 0 or halting to none"
            )
        if heads >= self.data.seq_len:
            raise ConfigError(
                f"model.extra_heads is {heads}, but data.seq_len is {self.data.seq_len}, so the last of them would "
                "have no label in a sequence; lower model.extra_heads"
            )

    def _check_interleaved(self) -> None:
        """Refuse what passes over the same positions have, and positions between the tokens do not."""
        if self.model.feedback not in INTERLEAVED:
            return
        pondering = self.train.pondering
        for name, value, default in (
            ("pondering.per", pondering.per, "step"),
            ("pondering.backward_passes", pondering.backward_passes, None),
            ("pass_losses", self.train.pass_losses, "last"),
        ):
            if value != default:
                raise ConfigError(
                    f"train.{name} is {value} with model.feedback {self.model.feedback}, which has one prediction a "
                    f"token and no earlier passes to choose from; leave train.{name} at its default"
                )
        if self.train.attention == "flash_attention_2":
            raise ConfigError(
                f"train.attention is flash_attention_2 with model.feedback {self.model.feedback}, whose positions "
                "repeat, so each would count as a new document; use sdpa"
            )

    def _check_pondering(self) -> None:
        pondering = self.train.pondering
        if pondering.schedule != "fixed" and pondering.low > self.model.pondering_steps:
            raise ConfigError(
                f"train.pondering.low is {pondering.low}, above model.pondering_steps "
                f"({self.model.pondering_steps}); lower it"
            )
        if pondering.backward_passes is not None and self.model.residual == "replace":
            raise ConfigError(
                f"train.pondering.backward_passes is {pondering.backward_passes} with model.residual replace, so no "
                "gradient would reach the input embeddings; set model.residual to accumulate or restart, or "
                "backward_passes to null"
            )
        if pondering.backward_passes is not None and self.train.pass_losses != "last":
            raise ConfigError(
                f"train.pondering.backward_passes is {pondering.backward_passes} with train.pass_losses "
                f"{self.train.pass_losses}, so the losses of earlier passes would have no gradient; set "
                "backward_passes to null or pass_losses to last"
            )
        if pondering.backward_passes == 1 and self.model.feedback == "both":
            raise ConfigError(
                "train.pondering.backward_passes is 1 with model.feedback both, so the gate would get no gradient and "
                "stay closed; use at least 2"
            )
        mean = pondering.mean
        if mean is not None and mean > self.model.pondering_steps:
            raise ConfigError(
                f"train.pondering.mean is {mean}, above model.pondering_steps ({self.model.pondering_steps}), which no "
                "draw may exceed; lower the mean, or raise model.pondering_steps to about twice the mean"
            )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a recipe and `key=value` overrides describe.

    Args:
        name: a YAML file, or the name of a shipped recipe.

    Raises ConfigError as `settings.load` does, and if there is no such recipe.
    """
    return load(RunConfig, find_recipe(name, RECIPES), overrides)
