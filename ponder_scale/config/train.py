"""The knobs of training and of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ponder_scale.errors import ConfigError
from ponder_scale.settings import MISSING, knob

from .bounds import MOST_SEQUENCES, MOST_STEPS, MOST_WIDTH


@dataclass(frozen=True)
class PonderingSchedule:
    """How many pondering steps an optimizer step takes, at most `model.pondering_steps`."""

    schedule: Literal["fixed", "uniform", "ramp", "lognormal-poisson"] = knob(
        "fixed",
        "How the number of pondering steps of an optimizer step is chosen. fixed: always `model.pondering_steps`. "
        "uniform: drawn evenly from `low` to `model.pondering_steps`. ramp: rises from `low` to "
        "`model.pondering_steps`. lognormal-poisson: drawn around `mean` and clipped to the same two numbers. Huginn "
        "draws its depth in this way (arXiv 2502.05171).",
    )
    low: int = knob(1, "Fewest pondering steps that uniform, ramp and lognormal-poisson use.", min=0, max=64)
    ramp_steps: int = knob(
        0,
        "Step at which the ramp reaches `model.pondering_steps`. ramp needs at least 1, and no other schedule uses it.",
        unit="steps",
        min=0,
        max=MOST_STEPS,
    )
    mean: float | None = knob(
        None, "Mean of lognormal-poisson before it is clipped. Only this schedule has one.", above=0, max=64
    )
    per: Literal["step", "sequence"] = knob(
        "step",
        "How often uniform and lognormal-poisson draw. step: once for each optimizer step, for all its sequences. "
        "sequence: once for each sequence. Every sequence then costs as much as the one with the most steps.",
    )
    backward_passes: int | None = knob(
        None,
        "Number of passes through which gradients flow, counted from the last. `null` uses all passes. A lower number "
        "saves memory and time. In published runs, passes were then worth less (phi 0.38 instead of 0.46, arXiv "
        "2604.21106).",
        unit="passes",
        min=1,
        max=65,
    )

    def __post_init__(self) -> None:
        if (self.schedule == "lognormal-poisson") != (self.mean is not None):
            raise ConfigError(
                f"train.pondering.mean is {self.mean} with train.pondering.schedule {self.schedule}; lognormal-poisson "
                "needs a mean, and the other schedules must leave it null"
            )
        if self.schedule == "ramp" and self.ramp_steps == 0:
            raise ConfigError(
                "train.pondering.ramp_steps is 0 with train.pondering.schedule ramp, so nothing would rise; give the "
                "step at which the ramp reaches model.pondering_steps, or use fixed"
            )
        if self.per == "sequence" and self.schedule in ("fixed", "ramp"):
            raise ConfigError(
                f"train.pondering.per is sequence, but train.pondering.schedule {self.schedule} gives all sequences "
                "of a step the same number; use uniform or lognormal-poisson"
            )
        if self.per == "sequence" and self.backward_passes is not None:
            raise ConfigError(
                f"train.pondering.backward_passes is {self.backward_passes} with train.pondering.per sequence, so a "
                "sequence that ends early would get no gradient through its own last passes; set backward_passes to "
                "null or per to step"
            )


@dataclass(frozen=True)
class HaltingLoss:
    """The loss that teaches the gates of `model.halting`."""

    weight: float = knob(
        0.1,
        "Weight of a term in the loss. gate: the mean of the smallest gates. exit: the entropy of the probabilities "
        "with which each pass is the last.",
        min=0,
        max=1e6,
    )
    share: float = knob(
        0.1,
        "gate: share of the gates, the smallest ones, whose mean is in the loss. Training then halts about this share "
        "of the pondering.",
        min=0,
        max=1,
    )
    warmup_steps: int = knob(
        1000,
        "gate: steps over which `share` rises from 0 to its value.",
        unit="optimizer steps",
        min=0,
        max=MOST_STEPS,
    )


@dataclass(frozen=True)
class TrainConfig:
    """The length, precision and batches of the training, and how it uses memory."""

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
        "First step with the full `global_batch`, if you set `batch_ramp_from`.",
        unit="steps",
        min=2,
        max=MOST_STEPS,
    )
    micro_batch: int | Literal["auto"] = knob(
        1,
        "Sequences in one forward of one rank. auto: of the numbers that fit and divide the batch, the fastest one.",
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
        "pass: whole passes from their inputs. pass+layer: both. auto: of the policies that fit, the fastest one.",
    )
    memory_gib: float | None = knob(
        None,
        "Memory of each device that the planner may use, when it chooses for `auto` and sets ZeRO-3's limits. `null` "
        "allows all of it.",
        unit="GiB",
        above=0,
        max=2**20,
    )
    hardware: str | None = knob(
        None,
        "File that `ponder-scale plan --calibrate` wrote. `auto` then chooses by the figures in it. `null` uses the "
        "planner's own table.",
        path=True,
    )
    offload_activations: bool = knob(False, "Move the activations that are kept for backward to host memory.")
    attention: Literal["auto", "sdpa", "flash_attention_2"] = knob(
        "auto", "Attention implementation. auto uses flash-attn where it is installed, and sdpa elsewhere."
    )
    kernels: Literal["torch", "liger"] = knob(
        "torch", "Kernels of norms, rotary embedding and MLP. liger needs CUDA and llama or olmo2."
    )
    compile: bool = knob(False, "Compile the layers with torch.compile.")
    pondering: PonderingSchedule = field(default_factory=PonderingSchedule)
    pass_losses: Literal["last", "uniform", "linear", "random", "exit"] = knob(
        "last",
        "Passes whose losses are trained. last: only the last pass. uniform: all passes with equal weight. linear: "
        "pass s with a weight in proportion to s + 1. random: the last pass and one earlier pass, with equal weight. "
        "The earlier pass is drawn for each step. exit: the gates of each token weigh its losses, for "
        "`model.halting=exit`.",
    )
    halting: HaltingLoss = field(default_factory=HaltingLoss)
    multi_token_weight: float = knob(
        1.0, "Weight of the sum of the losses of `model.extra_heads` in the loss.", above=0, max=1e6
    )
    deepspeed: str = knob(
        "zero3",
        "How to shard the run: the name of a file in deepspeed_configs/, or a path. auto: of the ZeRO stages that fit, "
        "the fastest one.",
        path=True,
    )
    sanity_step: bool = knob(
        True, "Before step 1, try a forward, a backward and a save at full size, and drop their results."
    )
    time_limit: str | None = knob(
        "slurm",
        "Wall-clock limit for this attempt, as seconds or HH:MM:SS. Before it is reached, training saves a checkpoint "
        "and exits with 85. `slurm` uses the limit of the job. `null` disables it.",
    )

    def __post_init__(self) -> None:
        first, steps = self.batch_ramp_from, self.batch_ramp_steps
        if (first is None) != (steps is None):
            raise ConfigError(
                f"train.batch_ramp_from is {first} with train.batch_ramp_steps {steps}; set both or neither"
            )
        if first is not None and self.global_batch % max(1, first):
            raise ConfigError(
                f"train.batch_ramp_from is {first}; expected a divisor of train.global_batch ({self.global_batch})"
            )
        if steps is not None and steps > self.steps:
            raise ConfigError(f"train.batch_ramp_steps is {steps}, more than train.steps ({self.steps}); lower it")

    @property
    def batch_unit(self) -> int:
        """The number of sequences that every step has a multiple of. It must divide over micro-batches and ranks."""
        return self.batch_ramp_from or self.global_batch

    def batch_at(self, step: int) -> int:
        """Sequences of optimizer step `step`, counted from 1.

        A ramp has n = global_batch / batch_ramp_from sizes. Each size takes an equal share of the steps before
        `batch_ramp_steps`, as far as whole steps allow. Megatron-LM's --rampup-batch-size gives each size an equal
        share of the sequences instead.
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
        # The batch rises for the k-th time after the first ceil(k last / rises) steps.
        larger = sum(max(0, step + (-k * last) // rises) for k in range(1, rises + 1))
        return self.batch_unit * (step + larger)

    @property
    def micro_batch_sequences(self) -> int:
        """`micro_batch` as a number. When a run starts, it replaces `auto` by a number."""
        assert isinstance(self.micro_batch, int), "train.micro_batch is still auto"
        return self.micro_batch


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "muon"] = knob(
        "adamw",
        "adamw: AdamW for all weights. muon: Muon for the matrices of the layers, and AdamW for the rest. Muon needs "
        "ZeRO stage 0 or 3 and `grad_clip=null`.",
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
        "The `model.hidden_size` at which you tuned `lr`. At other widths muP adapts learning rates, initial weights "
        "and weight decay. `null` takes `lr` as it is.",
        min=1,
        max=MOST_WIDTH,
    )
    min_lr: float = knob(3e-5, "Learning rate at the last step.", min=0, max=1000)
    warmup_steps: int = knob(0, "Steps of linear warm-up from 0.", unit="steps", min=0, max=MOST_STEPS)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = knob(
        "cosine", "Decay after warm-up. wsd: constant, with a decay over the last `wsd_decay_steps` steps."
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
        "matrices", "Which weights decay. matrices: all but norms, biases and embeddings. all: every weight."
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

    def __post_init__(self) -> None:
        if (self.optimizer == "muon") != (self.muon_lr is not None):
            raise ConfigError(
                f"optim.muon_lr is {self.muon_lr} with optim.optimizer {self.optimizer}; muon needs it "
                "(0.02 is usual), and adamw must leave it null"
            )
        if self.optimizer == "muon" and self.grad_clip is not None:
            raise ConfigError(
                f"optim.grad_clip is {self.grad_clip} with muon; under ZeRO it would clip the update of Muon instead "
                "of the gradient, and learning would be crippled; set optim.grad_clip=null"
            )
        if self.optimizer == "muon" and self.mup_base_width is not None:
            raise ConfigError(
                f"optim.mup_base_width is {self.mup_base_width} with muon, whose updates do not follow Adam's "
                "rule for width; use adamw, or leave it null"
            )
        if (self.schedule == "wsd") != (self.wsd_decay_steps is not None):
            raise ConfigError(
                f"optim.wsd_decay_steps is {self.wsd_decay_steps} with optim.schedule {self.schedule}; wsd needs it, "
                "and the other schedules must leave it null"
            )
        if self.min_lr > self.lr:
            raise ConfigError(f"optim.min_lr is {self.min_lr}, above optim.lr ({self.lr}); lower it")
