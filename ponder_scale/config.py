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

    architecture: Literal["llama", "gpt_neox", "gpt2", "olmo2"] = knob("llama", "The transformer that ponders.")
    vocab_size: int | None = knob(
        None,
        "Size of the vocabulary. `null` takes the tokenizer's, from the shards.",
        unit="tokens",
        min=1,
        max=MOST_VOCABULARY,
    )
    hidden_size: int = knob(512, "Width D of the hidden states.", min=1, max=MOST_WIDTH)
    intermediate_size: int = knob(1408, "Width of the MLP.", min=1, max=4 * MOST_WIDTH)
    num_hidden_layers: int = knob(8, "Number of layers L. Every pass runs all of them.", min=1, max=4096)
    num_attention_heads: int = knob(8, "Number of attention heads.", min=1, max=2**14)
    num_key_value_heads: int | None = knob(
        None,
        "Number of key-value heads, for llama and olmo2. `null` uses one for each attention head.",
        min=1,
        max=2**14,
    )
    max_position_embeddings: int | None = knob(
        None,
        "Longest sequence the model accepts. `null` uses `data.seq_len`.",
        unit="tokens",
        min=1,
        max=MOST_POSITIONS,
    )
    rope_theta: float | None = knob(
        None, "Base of the rotary embedding. `null` uses 10000. GPT-2 has none.", min=1, max=1e12
    )
    norm_eps: float = knob(1e-5, "Epsilon of the norms.", min=1e-12, max=1)
    tie_word_embeddings: bool | None = knob(
        None, "Use the embedding table as the head. `null` follows the architecture."
    )
    pondering_steps: int = knob(
        3, "S: how often the pondering embedding is fed back. The model runs S + 1 passes.", min=0, max=64
    )
    scale_embeds: bool = knob(True, "Multiply embeddings by sqrt(hidden_size).")
    initial_scale: float = knob(
        1.0, "Factor on the input embeddings e_0. The published multiply-by-steps variant uses S.", min=1e-6, max=1e6
    )
    pondering_temperature: float = knob(1.0, "Temperature tau of the pondering softmax.", min=1e-3, max=1e3)
    feedback: Literal["embedding", "hidden"] = knob(
        "embedding", "What a pass feeds back (T): the pondering embedding, or its hidden states."
    )
    residual: Literal["accumulate", "restart", "replace"] = knob(
        "accumulate",
        "How the feedback T enters the next pass. accumulate: e_s = e_{s-1} + T. restart: e_0 + T. replace: T.",
    )
    pondering_top_k: int | None = knob(
        None,
        "Build the pondering embedding from the k most probable tokens only. `null` uses the whole vocabulary.",
        unit="tokens",
        min=1,
        max=MOST_VOCABULARY,
    )
    init_by_passes: bool | None = knob(
        None,
        "Also divide the initial output projections by sqrt(S + 1). `null` follows the published code of "
        "the architecture.",
    )
    init_from: str | None = knob(
        None, "Start a new run from the weights of this Hugging Face folder, pondering or not.", path=True
    )
    extra: dict[str, Any] = knob({}, "More fields of the transformers configuration, under their own names.")


@dataclass(frozen=True)
class SourceConfig:
    """One folder of shards in the mixture."""

    path: str = knob(MISSING, "Folder of shards. It holds manifest.json.", path=True)
    weight: float = knob(1.0, "Share of the sequences, relative to the other sources.", above=0, max=MOST_WEIGHT)
    max_epochs: float | None = knob(
        None, "Read the source at most this many times. After that the other sources fill its share.", above=0, max=1e6
    )


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of training with its own mixture: a curriculum, or an annealing at the end."""

    tokens: float | None = knob(
        None,
        "Length of the phase. Only the last phase may be `null`: it lasts until the end.",
        unit="tokens",
        above=0,
        max=MOST_TOKENS,
    )
    weights: dict[str, float] = knob(
        {},
        "Weight of each source in this phase. A source you leave out is not read. {} uses the weights of "
        "`data.sources`.",
        min=0,
        max=MOST_WEIGHT,
    )


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in what pieces."""

    sources: dict[str, SourceConfig] = knob({}, "The mixture: a name for each folder of shards.")
    seq_len: int = knob(
        1024,
        "Predicted tokens in a sequence. The loader reads one token more.",
        unit="tokens",
        min=2,
        max=MOST_POSITIONS,
    )
    phases: list[PhaseConfig] = knob(
        [], "Mixtures that follow each other, for a curriculum or an annealing. [] trains on `data.sources` throughout."
    )
    skip: list[list[int]] = knob(
        [], "Ranges [first, end) of sequence numbers to leave out, such as those of a loss spike.", min=0, max=2**53
    )
    packing: Literal["concat", "best-fit"] = knob(
        "concat",
        "concat: join documents and cut wherever a sequence ends. best-fit: never cut a document that "
        "fits into a sequence, by the bins that `ponder-data pack` made.",
    )
    document_mask: bool = knob(False, "Keep attention within each document and start its positions at 0.")

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
        "fixed",
        "Pondering steps of each optimizer step. fixed: always `model.pondering_steps`. uniform: drawn "
        "between `low` and that number. ramp: rises from `low` to it.",
    )
    low: int = knob(1, "Fewest pondering steps that uniform and ramp use.", min=0, max=64)
    ramp_steps: int = knob(
        0, "Step at which the ramp reaches `model.pondering_steps`.", unit="steps", min=0, max=MOST_STEPS
    )


@dataclass(frozen=True)
class TrainConfig:
    """How much is trained, in what precision and pieces."""

    steps: int = knob(MISSING, "Number of optimizer steps.", unit="steps", min=1, max=MOST_STEPS)
    global_batch: int = knob(
        MISSING, "Sequences in one optimizer step, over all ranks.", unit="sequences", min=1, max=MOST_SEQUENCES
    )
    batch_ramp_from: int | None = knob(
        None,
        "Sequences in step 1. It must divide `global_batch`, and the batch grows in multiples of it. "
        "`null` uses `global_batch` from the start.",
        unit="sequences",
        min=1,
        max=MOST_SEQUENCES,
    )
    batch_ramp_steps: int | None = knob(
        None,
        "First step that uses the full `global_batch`, when you ramp the batch.",
        unit="steps",
        min=2,
        max=MOST_STEPS,
    )
    micro_batch: int | Literal["auto"] = knob(
        1,
        "Sequences in one forward of one rank. auto: those that take the least time, fit and divide the batch.",
        unit="sequences",
        min=1,
        max=MOST_SEQUENCES,
    )
    precision: Literal["fp32", "bf16"] = knob(
        "bf16", "Precision of the computation. bf16 keeps master weights in fp32."
    )
    recompute: Literal["none", "selective", "layer", "pass", "pass+layer", "auto"] = knob(
        "pass",
        "What backward computes again. selective: layers without their attention. layer: whole layers. "
        "pass: whole passes from their inputs. pass+layer: both. auto: what takes the least time and fits.",
    )
    memory_gib: float | None = knob(
        None,
        "Device memory that `auto` and the limits of ZeRO-3 may plan with. `null` uses all of the device.",
        unit="GiB",
        above=0,
        max=2**20,
    )
    hardware: str | None = knob(
        None,
        "File that `ponder-scale plan --calibrate` wrote. `auto` uses its times. `null` uses the planner's table.",
        path=True,
    )
    offload_activations: bool = knob(False, "Keep the activations that recomputation saves in host memory.")
    attention: Literal["auto", "sdpa", "flash_attention_2"] = knob(
        "auto", "Attention implementation. auto uses flash-attn where it is installed, and sdpa elsewhere."
    )
    kernels: Literal["torch", "liger"] = knob(
        "torch", "Kernels of norms, rotary embedding and MLP. liger needs CUDA and llama or olmo2."
    )
    compile: bool = knob(False, "Compile the layers with torch.compile.")
    pondering: PonderingSchedule = field(default_factory=PonderingSchedule)
    deepspeed: str = knob(
        "zero3",
        "How to shard the run: the name of a file in deepspeed_configs/, or a path. auto: the stage that takes the "
        "least time.",
        path=True,
    )
    sanity_step: bool = knob(
        True, "Before step 1, try forward and backward at full size and a trial save, then drop the result."
    )
    time_limit: str | None = knob(
        "slurm",
        "Wall-clock limit for this attempt, as seconds or HH:MM:SS. Training saves a checkpoint and exits "
        "with 85 before it is reached. `slurm` uses the limit of the job. `null` disables it.",
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
        "adamw",
        "adamw, or muon for the matrices of the layers with AdamW for the rest. Muon needs ZeRO stage 0 "
        "or 3 and no `grad_clip`.",
    )
    muon_lr: float | None = knob(
        None,
        "Peak learning rate of the matrices that Muon updates. It follows the schedule of `lr`.",
        above=0,
        max=1000,
    )
    muon_momentum: float = knob(0.95, "Momentum of Muon.", min=0, below=1)
    lr: float = knob(3e-4, "Peak learning rate.", above=0, max=1000)
    mup_base_width: int | None = knob(
        None,
        "`model.hidden_size` that `lr` was tuned at. At other widths rates, initial weights and decay follow by muP. "
        "`null` takes `lr` as it is.",
        min=1,
        max=MOST_WIDTH,
    )
    min_lr: float = knob(3e-5, "Learning rate at the last step.", min=0, max=1000)
    warmup_steps: int = knob(0, "Steps of linear warm-up from 0.", unit="steps", min=0, max=MOST_STEPS)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = knob(
        "cosine", "Decay after warm-up. wsd stays constant and decays over the last `wsd_decay_steps`."
    )
    wsd_decay_steps: int | None = knob(None, "Length of the decay of wsd.", unit="steps", min=1, max=MOST_STEPS)
    wsd_decay_style: Literal["linear", "minus_sqrt"] = knob(
        "linear", "Shape of the decay of wsd. minus_sqrt: 1 - sqrt(progress)."
    )
    beta1: float = knob(0.9, "AdamW: decay of the first moment.", min=0, below=1)
    beta2: float = knob(0.95, "AdamW: decay of the second moment.", min=0, below=1)
    eps: float = knob(1e-8, "AdamW: epsilon.", min=1e-30, max=1)
    weight_decay: float = knob(0.1, "Decoupled weight decay.", min=0, max=1000)
    decay: Literal["matrices", "all"] = knob(
        "matrices", "Which weights decay. matrices leaves out norms, biases and embeddings."
    )
    ema: float | None = knob(
        None,
        "Keep a running average of the weights with this decay, for `export --ema`. `null` keeps none.",
        above=0,
        max=0.999999,
    )
    z_loss: float = knob(
        0.0, "Add this multiple of the mean squared log-sum-exp of the logits to the loss.", min=0, max=1000
    )
    grad_clip: float | None = knob(
        1.0, "Clip the global gradient norm to this bound. `null` disables clipping.", above=0, max=1e9
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what is kept. The last step is always saved."""

    every_steps: int | None = knob(
        None,
        "Save a checkpoint at every multiple of this step. `null` does not save by steps.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    every_minutes: float | None = knob(
        None,
        "Save when this many minutes have passed since the last save. `null` does not save by time.",
        above=0,
        max=1e6,
    )
    milestones: list[int] = knob([], "Save at these steps and keep those checkpoints forever.", min=1, max=MOST_STEPS)
    keep: int | None = knob(3, "Keep this many of the newest checkpoints. `null` keeps all.", min=1, max=10**6)
    keep_every: int | None = knob(
        None, "Keep every checkpoint whose step is a multiple of this, forever.", unit="steps", min=1, max=MOST_STEPS
    )
    asynchronous: bool = knob(
        False, "Train on while a copy of the state is written in the background. The copy takes host memory."
    )

    def __post_init__(self) -> None:
        if self.keep_every and self.every_steps and self.keep_every % self.every_steps:
            raise ConfigError(
                f"checkpoint.keep_every is {self.keep_every}; expected a multiple of checkpoint.every_steps "
                f"({self.every_steps}): only what is saved can be kept"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out perplexity of every pass during training, and downstream tasks."""

    every_steps: int | None = knob(
        None,
        "Evaluate at every multiple of this step. `null` evaluates only after the last step.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    sequences: int = knob(
        256,
        "Held-out sequences to read from each source. A source with fewer uses all of them.",
        unit="sequences",
        min=1,
        max=10**9,
    )
    tasks: list[str] = knob([], "Tasks of lm-evaluation-harness to ask the model while it trains. [] asks none.")
    tasks_every_steps: int | None = knob(
        None,
        "Ask the tasks at every multiple of this step. `null` asks only after the last step.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    tasks_include: str | None = knob(
        None,
        "Folder of task files with their data. `null` uses the harness's own tasks, whose data come from the hub.",
        path=True,
    )
    tasks_limit: int | None = knob(
        None, "Documents to ask of each task. `null` asks all.", unit="documents", min=1, max=10**9
    )
    tasks_batch: int = knob(
        8, "Requests of the tasks in one forward of one rank.", unit="requests", min=1, max=MOST_SEQUENCES
    )

    def __post_init__(self) -> None:
        for key in ("tasks_every_steps", "tasks_include", "tasks_limit"):
            if not self.tasks and (value := getattr(self, key)) is not None:
                raise ConfigError(
                    f"evaluate.{key} is {value} and evaluate.tasks is empty; name tasks, or leave it null"
                )


@dataclass(frozen=True)
class HealthConfig:
    """What is watched while training, and what is done about it. docs/recovery.md says more."""

    hang_seconds: float | None = knob(
        600.0,
        "After this long without progress, print the stacks of every rank and exit with 86. `null` "
        "disables the watchdog.",
        unit="seconds",
        above=0,
        max=MOST_SECONDS,
    )
    slow_seconds: float = knob(
        3600.0,
        "The same limit during start-up, the first step, saves and evaluations.",
        unit="seconds",
        above=0,
        max=MOST_SECONDS,
    )
    max_skips: int = knob(
        8,
        "Skip at most this many steps in a row because they are not finite or spike. The next one ends "
        "the run with exit code 87.",
        min=0,
        max=10**6,
    )
    spike_sigma: float | None = knob(
        6.0,
        "Treat a loss or gradient norm this many standard deviations above its mean as a spike. `null` "
        "disables the check.",
        above=0,
        max=1e6,
    )
    spike_window: int = knob(
        128,
        "Steps over which that mean is taken. The check begins when half of them are recorded.",
        unit="steps",
        min=4,
        max=10**6,
    )
    on_spike: Literal["warn", "skip", "rewind"] = knob(
        "warn",
        "What to do about a spike. warn: record it. skip: drop the update. rewind: go back to the last "
        "checkpoint and leave out the data around the spike.",
    )
    rewind_skip_steps: int = knob(
        100,
        "A rewind leaves out the data of up to this many steps before the spike, as far back as the checkpoint.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    max_rewinds: int = knob(
        3, "Rewind at most this often. The next spike ends the run with exit code 87.", min=0, max=10**6
    )
    check_replicas_every: int | None = knob(
        100,
        "Compare the weights of all ranks at every multiple of this step. They must be equal. `null` "
        "disables the check.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    straggler_factor: float | None = knob(
        1.5,
        "Log a straggler event when one rank spends more than this multiple of the median time in a "
        "phase. `null` disables it.",
        above=1,
        max=1e6,
    )


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl is always written; the rest is asked for."""

    every_steps: int = knob(
        10, "Write a line of metrics at every multiple of this step.", unit="steps", min=1, max=MOST_STEPS
    )
    wandb: Literal["off", "online", "offline"] = knob("off", "Report to Weights & Biases.")
    wandb_project: str = knob("ponder-scale", "Project name in Weights & Biases.")
    tensorboard: bool = knob(False, "Write TensorBoard event files to RUN/tensorboard. Needs the tensorboard package.")
    communication: bool = knob(
        False, "Measure the share of time in collectives with a profiler. Logged steps get slower."
    )
    profile_steps: list[int] = knob(
        [],
        "Trace the steps [first, last] with the profiler of torch into RUN/profile. [] traces none.",
        min=0,
        max=MOST_STEPS,
    )
    profile_ranks: list[int] = knob([0], "Ranks that are traced.", min=0, max=10**6)
    track_tokens: int = knob(
        64,
        "Tokens of a micro-batch to examine for what each pass changes, on logged steps.",
        unit="tokens",
        min=1,
        max=MOST_POSITIONS,
    )

    def __post_init__(self) -> None:
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ConfigError(f"log.profile_steps is {steps}; expected [first, last] with 1 <= first <= last, or []")


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
        if self.optim.optimizer == "muon" and self.optim.mup_base_width is not None:
            raise ConfigError(
                f"optim.mup_base_width is {self.optim.mup_base_width} with muon, whose updates do not follow Adam's "
                "rule for width; use adamw, or leave it null"
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
