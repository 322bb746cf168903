"""Every knob of a training run, with its unit and bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ponder_scale.errors import ConfigError
from ponder_scale.files.shipped import RECIPES
from ponder_scale.settings import MISSING, find_recipe, knob, load

# Upper bounds that no run comes near: they tell a slip from a wish, and keep every number exact and finite.
MOST_STEPS = 10**9
MOST_TOKENS = 10**16
MOST_SEQUENCES = 2**24  # of a batch
MOST_POSITIONS = 2**27
MOST_WIDTH = 2**20
MOST_VOCABULARY = 2**24
MOST_WEIGHT = 10**15  # of a source: numbers of tokens are weights, too
MOST_SECONDS = 10**7


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Names are those of transformers' configurations."""

    architecture: Literal["llama", "gpt_neox", "gpt2", "olmo2"] = knob("llama", "the transformer that ponders")
    vocab_size: int | None = knob(
        None, "null: the tokenizer's, from the shards", unit="tokens", min=1, max=MOST_VOCABULARY
    )
    hidden_size: int = knob(512, "width D", min=1, max=MOST_WIDTH)
    intermediate_size: int = knob(1408, "width of the MLP", min=1, max=4 * MOST_WIDTH)
    num_hidden_layers: int = knob(8, "layers L, all run again in each pass", min=1, max=4096)
    num_attention_heads: int = knob(8, "attention heads", min=1, max=2**14)
    num_key_value_heads: int | None = knob(
        None, "null: as many as attention heads; llama and olmo2 only", min=1, max=2**14
    )
    max_position_embeddings: int | None = knob(None, "null: data.seq_len", unit="tokens", min=1, max=MOST_POSITIONS)
    rope_theta: float | None = knob(None, "base of the rotary embedding; null: 10000; not gpt2", min=1, max=1e12)
    norm_eps: float = knob(1e-5, "epsilon of the norms", min=1e-12, max=1)
    tie_word_embeddings: bool | None = knob(None, "the head is the embedding table; null: as the architecture has it")
    pondering_steps: int = knob(3, "S: feedbacks of the pondering embedding; S + 1 passes", min=0, max=64)
    scale_embeds: bool = knob(True, "multiply embeddings by sqrt(hidden_size)")
    initial_scale: float = knob(1.0, "factor on e_0; the published multiply-by-steps is S", min=1e-6, max=1e6)
    pondering_temperature: float = knob(1.0, "tau of the pondering softmax", min=1e-3, max=1e3)
    feedback: Literal["embedding", "hidden"] = knob("embedding", "T: the pondering embedding, or the hidden states")
    residual: Literal["accumulate", "restart", "replace"] = knob("accumulate", "e_s = e_{s-1} + T, or e_0 + T, or T")
    pondering_top_k: int | None = knob(None, "null: the whole vocabulary", unit="tokens", min=1, max=MOST_VOCABULARY)
    init_by_passes: bool | None = knob(None, "initial output projections also / sqrt(S + 1); null: as published")
    init_from: str | None = knob(
        None, "Hugging Face folder whose weights, pondering or not, a new run starts with", path=True
    )
    extra: dict[str, Any] = knob({}, "further keys of transformers' configuration, by its names")


@dataclass(frozen=True)
class SourceConfig:
    """One folder of shards in the mixture."""

    path: str = knob(MISSING, "folder with manifest.json", path=True)
    weight: float = knob(1.0, "share of the sequences, relative to the other sources", above=0, max=MOST_WEIGHT)
    max_epochs: float | None = knob(
        None, "readings of all its sequences; then the others fill its share", above=0, max=1e6
    )


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of training with its own mixture: a curriculum, or an annealing at the end."""

    tokens: float | None = knob(
        None, "its length; null, of the last phase only: until the end", unit="tokens", above=0, max=MOST_TOKENS
    )
    weights: dict[str, float] = knob(
        {}, "share of each source; sources that are not named rest; {}: as in sources", min=0, max=MOST_WEIGHT
    )


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in what pieces."""

    sources: dict[str, SourceConfig] = knob({}, "the mixture, by name")
    seq_len: int = knob(
        1024, "predicted tokens of a sequence; it is read with one more", unit="tokens", min=2, max=MOST_POSITIONS
    )
    phases: list[PhaseConfig] = knob([], "mixtures that follow each other; none: that of sources throughout")
    skip: list[list[int]] = knob(
        [], "[first, end) sequence numbers left out, such as those of a loss spike", min=0, max=2**53
    )
    packing: Literal["concat", "best-fit"] = knob(
        "concat",
        "concat: documents one after another, cut where a sequence ends; best-fit: no document that fits in a "
        "sequence is cut, by the bins that `ponder-data pack` made",
    )
    document_mask: bool = knob(False, "attention stays within documents, and positions begin at 0 in each")

    def __post_init__(self) -> None:
        for name in self.sources:
            if not name or "/" in name or not name.isprintable():
                raise ConfigError(
                    f"data.sources has {name!r}; a / stands between the name of a folder and that of a source in it, "
                    f"and a name is one line: use letters, digits, - and _"
                )
        for number, phase in enumerate(self.phases[:-1]):
            if phase.tokens is None:
                raise ConfigError(f"data.phases.{number}.tokens is null; only the last phase may last until the end")
        for stretch in self.skip:
            if len(stretch) != 2 or not 0 <= stretch[0] < stretch[1]:
                raise ConfigError(f"data.skip has {stretch}; expected [first, end] with 0 <= first < end")


@dataclass(frozen=True)
class PonderingSchedule:
    """How many pondering steps an optimizer step takes, at most `model.pondering_steps`."""

    schedule: Literal["fixed", "uniform", "ramp"] = knob(
        "fixed", "fixed: model.pondering_steps; uniform: drawn from low to it for each step; ramp: rises from low to it"
    )
    low: int = knob(1, "smallest number of pondering steps of uniform and ramp", min=0, max=64)
    ramp_steps: int = knob(0, "the ramp is over after so many", unit="steps", min=0, max=MOST_STEPS)


@dataclass(frozen=True)
class TrainConfig:
    """How much is trained, in what precision and pieces."""

    steps: int = knob(MISSING, "optimizer steps", unit="steps", min=1, max=MOST_STEPS)
    global_batch: int = knob(
        MISSING, "sequences of one optimizer step, over all ranks", unit="sequences", min=1, max=MOST_SEQUENCES
    )
    batch_ramp_from: int | None = knob(
        None,
        "sequences of step 1, a divisor of global_batch; the batch rises in multiples of it; null: global_batch",
        unit="sequences",
        min=1,
        max=MOST_SEQUENCES,
    )
    batch_ramp_steps: int | None = knob(
        None,
        "the step that is the first of global_batch sequences, where the batch rises",
        unit="steps",
        min=2,
        max=MOST_STEPS,
    )
    micro_batch: int | Literal["auto"] = knob(
        1,
        "sequences of one forward on one rank; auto: the most that fit and divide",
        unit="sequences",
        min=1,
        max=MOST_SEQUENCES,
    )
    precision: Literal["fp32", "bf16"] = knob("bf16", "bf16 keeps fp32 master weights")
    recompute: Literal["none", "selective", "layer", "pass", "pass+layer", "auto"] = knob(
        "pass",
        "what backward recomputes: nothing, layers but for attention, layers, passes from their inputs, or both; "
        "auto: the least that fits",
    )
    memory_gib: float | None = knob(
        None, "what `auto` and ZeRO-3's limits may use of a device; null: all it has", unit="GiB", above=0, max=2**20
    )
    offload_activations: bool = knob(False, "keep on the host what recomputation keeps")
    attention: Literal["auto", "sdpa", "flash_attention_2"] = knob("auto", "auto: flash-attn where it is, else sdpa")
    kernels: Literal["torch", "liger"] = knob("torch", "of norms, rotary embedding and MLP; liger: CUDA, llama, olmo2")
    compile: bool = knob(False, "compile the layers with torch.compile")
    pondering: PonderingSchedule = field(default_factory=PonderingSchedule)
    deepspeed: str = knob("zero3", "how to shard: a file of deepspeed_configs/ by name, or a path", path=True)
    sanity_step: bool = knob(True, "before step 1: forward and backward at full size, a trial save; all dropped")
    time_limit: str | None = knob(
        "slurm", "of this attempt, which saves and ends in time: seconds or HH:MM:SS; slurm: the job's; null: none"
    )

    def __post_init__(self) -> None:
        first, steps = self.batch_ramp_from, self.batch_ramp_steps
        if (first is None) != (steps is None):
            raise ConfigError(
                f"train.batch_ramp_from is {first} with train.batch_ramp_steps {steps}; a ramp needs both, else neither"
            )
        if first is not None and self.global_batch % max(1, first):
            raise ConfigError(
                f"train.batch_ramp_from is {first}; expected a divisor of train.global_batch ({self.global_batch})"
            )
        if steps is not None and steps > self.steps:
            raise ConfigError(f"train.batch_ramp_steps is {steps}, more than train.steps ({self.steps}); lower it")

    @property
    def batch_unit(self) -> int:
        """Sequences that every step has a multiple of, so this is what has to divide over micro-batches and ranks."""
        return self.batch_ramp_from or self.global_batch

    def batch_at(self, step: int) -> int:
        """Sequences of optimizer step `step`, counted from 1.

        With a ramp the n sizes, n = global_batch / batch_ramp_from, take equal shares of the steps before
        `batch_ramp_steps`, as far as whole steps allow; Megatron-LM's --rampup-batch-size does so by sequences.
        """
        if self.batch_ramp_steps is None:
            return self.global_batch
        rises, last = self.global_batch // self.batch_unit - 1, self.batch_ramp_steps - 1
        return self.batch_unit * (1 + rises * min(step - 1, last) // last)

    def sequences_until(self, step: int) -> int:
        """Sequences of steps 1 to `step` together."""
        if self.batch_ramp_steps is None:
            return step * self.global_batch
        rises, last = self.global_batch // self.batch_unit - 1, self.batch_ramp_steps - 1
        # rise number k comes after the first ceil(k last / rises) steps
        larger = sum(max(0, step + (-k * last) // rises) for k in range(1, rises + 1))
        return self.batch_unit * (step + larger)

    @property
    def micro_batch_sequences(self) -> int:
        """`micro_batch` once it is a number: `auto` is replaced when a run starts."""
        assert isinstance(self.micro_batch, int), "train.micro_batch is still auto"
        return self.micro_batch


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "muon"] = knob(
        "adamw", "muon: for the matrices of the layers, with AdamW for the rest; stages 0 and 3, and no grad_clip"
    )
    muon_lr: float | None = knob(
        None, "peak learning rate of Muon's matrices, on the schedule of lr", above=0, max=1000
    )
    muon_momentum: float = knob(0.95, "of Muon", min=0, below=1)
    lr: float = knob(3e-4, "peak learning rate", above=0, max=1000)
    min_lr: float = knob(3e-5, "learning rate at the last step", min=0, max=1000)
    warmup_steps: int = knob(0, "linear rise from 0", unit="steps", min=0, max=MOST_STEPS)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = knob(
        "cosine", "shape of the decay after warm-up; wsd: constant, then a decay over the last wsd_decay_steps"
    )
    wsd_decay_steps: int | None = knob(None, "length of the decay of wsd", unit="steps", min=1, max=MOST_STEPS)
    wsd_decay_style: Literal["linear", "minus_sqrt"] = knob("linear", "its shape; minus_sqrt: 1 - sqrt(progress)")
    beta1: float = knob(0.9, "decay of the first moment", min=0, below=1)
    beta2: float = knob(0.95, "decay of the second moment", min=0, below=1)
    eps: float = knob(1e-8, "AdamW epsilon", min=1e-30, max=1)
    weight_decay: float = knob(0.1, "decoupled weight decay", min=0, max=1000)
    decay: Literal["matrices", "all"] = knob("matrices", "matrices: not norms, biases, embeddings")
    ema: float | None = knob(
        None, "decay of a running average of the weights, for `export --ema`; null: none", above=0, max=0.999999
    )
    z_loss: float = knob(0.0, "adds so much of the mean squared log-sum-exp of the logits to the loss", min=0, max=1000)
    grad_clip: float | None = knob(1.0, "bound on the global gradient norm; null: off", above=0, max=1e9)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what is kept. The last step is always saved."""

    every_steps: int | None = knob(None, "null: not by steps", unit="steps", min=1, max=MOST_STEPS)
    every_minutes: float | None = knob(None, "null: not by time; else so long after the last save", above=0, max=1e6)
    milestones: list[int] = knob([], "steps that are saved and never deleted", min=1, max=MOST_STEPS)
    keep: int | None = knob(3, "newest checkpoints kept; null: all", min=1, max=10**6)
    keep_every: int | None = knob(
        None, "those of each so many steps are never deleted", unit="steps", min=1, max=MOST_STEPS
    )
    asynchronous: bool = knob(False, "train on while a host copy of the state is written; takes memory for the copy")

    def __post_init__(self) -> None:
        if self.keep_every and self.every_steps and self.keep_every % self.every_steps:
            raise ConfigError(
                f"checkpoint.keep_every is {self.keep_every}; expected a multiple of checkpoint.every_steps "
                f"({self.every_steps}): only what is saved can be kept"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out perplexity of every pass during training."""

    every_steps: int | None = knob(None, "null: only after the last step", unit="steps", min=1, max=MOST_STEPS)
    sequences: int = knob(
        256, "held-out sequences of each source; fewer if its shards hold fewer", unit="sequences", min=1, max=10**9
    )


@dataclass(frozen=True)
class HealthConfig:
    """What is watched while training, and what is done about it. docs/recovery.md says more."""

    hang_seconds: float | None = knob(
        600.0,
        "without progress: the stacks of every rank, then exit code 86; null: off",
        unit="seconds",
        above=0,
        max=MOST_SECONDS,
    )
    slow_seconds: float = knob(
        3600.0,
        "the same while starting up, in the first step, saving, evaluating",
        unit="seconds",
        above=0,
        max=MOST_SECONDS,
    )
    max_skips: int = knob(
        8,
        "steps in a row that are skipped, as not finite or as spikes; at the next one the run ends, exit code 87",
        min=0,
        max=10**6,
    )
    spike_sigma: float | None = knob(
        6.0, "loss or gradient norm so many standard deviations above its mean is a spike; null: off", above=0, max=1e6
    )
    spike_window: int = knob(
        128, "steps that the mean is over; half of them must be there", unit="steps", min=4, max=10**6
    )
    on_spike: Literal["warn", "skip", "rewind"] = knob(
        "warn", "warn: record it; skip: no update by it; rewind: to the last checkpoint, leaving out its data"
    )
    rewind_skip_steps: int = knob(
        100,
        "a rewind leaves out the data of so many steps up to the spike, back to the checkpoint",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    max_rewinds: int = knob(3, "at the next spike the run ends, exit code 87", min=0, max=10**6)
    check_replicas_every: int | None = knob(
        100, "compare the weights of all ranks, which must be equal; null: off", unit="steps", min=1, max=MOST_STEPS
    )
    straggler_factor: float | None = knob(
        1.5, "a rank is named if a phase takes so many times the median of the ranks; null: off", above=1, max=1e6
    )


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl is always written; the rest is asked for."""

    every_steps: int = knob(10, "a line of metrics each so many steps", unit="steps", min=1, max=MOST_STEPS)
    wandb: Literal["off", "online", "offline"] = knob("off", "Weights & Biases")
    wandb_project: str = knob("ponder-scale", "project name there")
    tensorboard: bool = knob(False, "event files for TensorBoard in RUN/tensorboard; needs its package")
    communication: bool = knob(
        False, "measure the share of collectives by a profiler on logged steps, which slows them"
    )
    profile_steps: list[int] = knob(
        [], "[first, last] steps traced by torch's profiler into RUN/profile; []: none", min=0, max=MOST_STEPS
    )
    profile_ranks: list[int] = knob([0], "ranks that do so", min=0, max=10**6)
    track_tokens: int = knob(
        64, "of a micro-batch of a logged step, for what each pass changes", unit="tokens", min=1, max=MOST_POSITIONS
    )

    def __post_init__(self) -> None:
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ConfigError(f"log.profile_steps is {steps}; expected [first, last] with 1 <= first <= last, or []")


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    run_dir: str = knob(MISSING, "everything the run writes; its identity", path=True)
    seed: int = knob(1, "of initial weights, data order, random pondering steps and dropout", min=0, max=2**31 - 1)
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
        if (self.optim.optimizer == "muon") != (self.optim.muon_lr is not None):
            raise ConfigError(
                f"optim.muon_lr is {self.optim.muon_lr} with optim.optimizer {self.optim.optimizer}; muon needs it "
                "(0.02 is usual), adamw has none"
            )
        if self.optim.optimizer == "muon" and self.optim.grad_clip is not None:
            raise ConfigError(
                f"optim.grad_clip is {self.optim.grad_clip} with muon: under ZeRO it would clip Muon's update, whose "
                "norm is not the gradient's, and cripple learning; set optim.grad_clip=null"
            )
        if self.health.on_spike == "rewind" and not (self.checkpoint.every_steps or self.checkpoint.every_minutes):
            raise ConfigError(
                "health.on_spike is rewind, but nothing is saved to go back to: the run would begin anew; set "
                "checkpoint.every_steps or checkpoint.every_minutes"
            )
        decay = self.optim.wsd_decay_steps
        if (self.optim.schedule == "wsd") != (decay is not None):
            raise ConfigError(
                f"optim.wsd_decay_steps is {decay} with optim.schedule {self.optim.schedule}; wsd needs it, "
                "the other schedules have none"
            )
        if decay is not None and decay > self.train.steps - self.optim.warmup_steps:
            raise ConfigError(
                f"optim.wsd_decay_steps is {decay}, more than the {self.train.steps - self.optim.warmup_steps} steps "
                "after warm-up; lower it"
            )
        if self.optim.min_lr > self.optim.lr:
            raise ConfigError(f"optim.min_lr is {self.optim.min_lr}, above optim.lr ({self.optim.lr}); lower it")
        if self.model.hidden_size % self.model.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size is {self.model.hidden_size}; expected a multiple of "
                f"model.num_attention_heads ({self.model.num_attention_heads})"
            )
        if self.train.pondering.schedule != "fixed" and self.train.pondering.low > self.model.pondering_steps:
            raise ConfigError(
                f"train.pondering.low is {self.train.pondering.low}, above model.pondering_steps "
                f"({self.model.pondering_steps}); lower it"
            )
        if self.train.offload_activations and self.train.recompute == "none":
            raise ConfigError("train.offload_activations needs a train.recompute that keeps little; none keeps all")
        if not self.data.sources:
            raise ConfigError("data.sources is empty; name a folder of shards: data.sources.NAME.path=FOLDER")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run as a recipe and `key=value` overrides describe it.

    Args:
        name: a YAML file, or the name of a shipped recipe.

    Raises ConfigError as `settings.load` does, and where there is no such recipe.
    """
    return load(RunConfig, find_recipe(name, RECIPES), overrides)
