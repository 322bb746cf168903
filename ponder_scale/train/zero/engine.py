"""The DeepSpeed engine behind the training loop.

DeepSpeed gets some things wrong when one transformer runs S + 1 times a step. They are corrected here. Each correction
has its reason beside it and a test.
"""

from __future__ import annotations

import logging
import os
import resource
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor

from ponder_scale.checkpoint.parts import Parts
from ponder_scale.config import RunConfig
from ponder_scale.data.sequences import MicroBatch
from ponder_scale.errors import ConfigError
from ponder_scale.planning.cost import gathering
from ponder_scale.planning.hardware import peak_flops
from ponder_scale.planning.plan import present_devices, settle_sharding
from ponder_scale.planning.shape import run_shape
from ponder_scale.setup.recompute import refuse_foreign_checkpointing
from ponder_scale.setup.speed import document_arguments
from ponder_scale.train.console import folded
from ponder_scale.train.launch import RANK_VARIABLES, free_port
from ponder_scale.train.zero.deepspeed_config import deepspeed_config, read_sharding
from ponder_scale.train.zero.deepspeed_version import TESTED, is_tested, refuse_wrong_version
from ponder_scale.train.zero.gate import Accept, Gate
from ponder_scale.train.zero.optimizer import load_muon, make_optimizer
from ponder_scale.train.zero.partition import Partition, Scalars
from ponder_scale.train.zero.shared_weights import keep_tables_gathered, release_in_backward
from ponder_scale.train.zero.traces import TraceBank

logger = logging.getLogger(__name__)


def init_distributed(timeout: timedelta | None = None) -> None:
    """Join the process group that the environment describes, or become the only rank of a new one.

    Args:
        timeout: longest time of a collective. The default is torch's, half an hour.

    Raises:
        ConfigError: only some of the rank variables are set. DeepSpeed would then ask MPI, and every process would
            train as rank 0 of 1.
    """
    present = [name for name in RANK_VARIABLES if name in os.environ]
    if not present:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    elif len(present) < len(RANK_VARIABLES):
        missing = ", ".join(name for name in RANK_VARIABLES if name not in present)
        raise ConfigError(f"environment: {', '.join(present)} set but not {missing}; set all five or none")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_no_refusal)
    # torch 2.13 has renamed collectives that DeepSpeed calls, which would log a warning for each call of each step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    # DeepSpeed's shared-memory all-reduce is for inference on CPUs, and compiling it would take 20 s.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:  # without LOCAL_SIZE, ZeRO-3 runs `numactl` for each bucket that it reduces, to count processors
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    _allow_connections()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    patience = {} if timeout is None else {"timeout": timeout}
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, **patience)


def _allow_connections() -> None:
    """Raise this process's limit of open files to the hard limit.

    gloo connects every rank with every other, so the usual limit of 1,024 would end with a thousand ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _is_no_refusal(record: logging.LogRecord) -> bool:
    # DeepSpeed takes a step that the gate refuses, as in the rehearsal, for an overflow. We log the true reason.
    return "overflow!" not in record.getMessage().lower()


def from_first_rank(value: Any) -> Any:
    """Rank 0's value, on every rank. Collective."""
    box = [value]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


class Engine:
    """A model under ZeRO. A step is `micro_step` for each of its micro-batches, then `update`.

    Args:
        model: a pondering model in fp32 on the CPU, equal on all ranks, with recomputation already applied.
        config: the run's configuration. The process group must exist.
    """

    def __init__(self, model: Any, config: RunConfig) -> None:
        refuse_foreign_checkpointing(model)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        sharding = self.sharding = read_sharding(config.train.deepspeed)  # unchanged from the file, for the record
        _refuse_without_cuda(sharding["zero_optimization"], config.train.deepspeed)
        if self.rank == 0:
            sharding = settle_sharding(config, sharding, model.config, present_devices(config, self.world_size))
        sharding = from_first_rank(sharding)
        self.zero_stage: int = sharding["zero_optimization"]["stage"]
        refuse_wrong_version(deepspeed.__version__, self.zero_stage, config.train.precision)
        if self.rank == 0 and not is_tested(deepspeed.__version__):
            logger.warning(
                "deepspeed %s is not among the versions that were tested (%s); a version is refused only if it is "
                "known to be wrong",
                *(deepspeed.__version__, ", ".join(TESTED)),
            )
        shape = run_shape(config, model.config)
        gathers = gathering(shape, sharding["zero_optimization"], config.train.recompute)
        if gathers is not None:
            for line in folded(gathers.sentence):
                logger.info("%s", line)
        settings = deepspeed_config(sharding, config.train, config.optim, self.world_size)
        self._z_loss, self._ema = config.optim.z_loss, config.optim.ema
        self._backward_passes = config.train.pondering.backward_passes
        self.average_since: int | None = None  # the first step in the running average of the weights
        self.micro_steps: int = settings["gradient_accumulation_steps"]
        if config.train.precision == "bf16":
            model = model.to(torch.bfloat16)
        self.parameters: int = sum(parameter.numel() for parameter in model.parameters())
        offloads = {"offload_optimizer", "offload_param"} & sharding["zero_optimization"].keys()
        if offloads or torch.cuda.is_available():  # DeepSpeed compiles operators then, each under a lock
            from ponder_scale.train.survive import baton  # slow to import

            baton.install()
        optimizer = make_optimizer(model, config, offload="offload_optimizer" in offloads)
        load_muon()  # must come before DeepSpeed imports Muon itself, which takes longer
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.device: torch.device = self.deepspeed.device
        if self.zero_stage == 0 and config.train.precision == "bf16":
            # This wrapper takes an optimizer step on zero gradients to allocate the moments. The step count would then
            # start at 1, and the first update would be 0.75 of the right one. AdamW makes its state when first needed.
            self.deepspeed.basic_optimizer.state.clear()
        self.partition = Partition(self.deepspeed, self.zero_stage, self.rank, self.world_size)
        plain = self.zero_stage == 0 and config.train.precision == "fp32"
        self._gate = Gate(self.deepspeed, self.zero_stage, deepspeed.__version__, plain=plain)
        self._micro_steps_done = 0  # in the current step; back to 0 after its last micro-step
        self._traces: TraceBank | None = None
        if self.zero_stage == 3:
            keep_tables_gathered(self.deepspeed.module)
            release_in_backward(self.deepspeed)
            varies = config.train.pondering.schedule != "fixed" or config.model.feedback == "latent"
            if varies or config.model.extra_heads:  # evaluation runs no heads
                self._traces = TraceBank(self.deepspeed)

    @property
    def optimizer_name(self) -> str:
        """The name of the method, the same for all of its implementations."""
        name = type(self.deepspeed.basic_optimizer).__name__
        return {"DeepSpeedCPUAdam": "AdamW"}.get(name, name)

    @property
    def module(self) -> Any:
        """The model inside the engine."""
        return self.deepspeed.module

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the coming step, in every parameter group."""
        for group in self.deepspeed.basic_optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def set_batch(self, sequences: int) -> None:
        """Set the sequences of the coming steps over all ranks. This changes the number of micro-steps."""
        assert self._micro_steps_done == 0, "the batch changes in the middle of a step"
        self.deepspeed.set_train_batch_size(sequences)  # DeepSpeed divides the loss of a micro-batch by it
        self.micro_steps = self.deepspeed.gradient_accumulation_steps()

    def micro_step(
        self,
        batch: MicroBatch,
        pondering_steps: int | None = None,
        sequence_steps: Tensor | None = None,
        *,
        track: int | None = None,
        label_count: Tensor | None = None,
        pass_weights: Sequence[float] | None = None,
        halting_loss: tuple[float, float] | None = None,
        multi_token_weight: float | None = None,
        refinements: int | None = None,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Any:
        """Run forward and backward of a micro-batch and add its gradients to the step. Returns the model's output.

        Args:
            pondering_steps: replaces the model's number. It must be the same on all ranks, see `agree_on`.
            sequence_steps: (B,), if sequences take fewer. They may differ from rank to rank.
            track: number of tokens for which to measure what each pass changes.
            label_count: divides the summed loss. The default is the number of labels that count in this micro-batch.
            pass_weights: weights of the passes' losses, the same on all ranks. The default trains the last pass alone.
            halting_loss: weight and share of the loss of the gates. None trains no gate to close.
            multi_token_weight: weight of the losses of the extra heads. None trains none.
            refinements: those of latents, the same on all ranks.
            enter: called with "forward" and "backward" as each begins.
        """
        enter("forward")
        tokens, labels, position_ids = batch
        asked: dict[str, Any] = {"sequence_steps": sequence_steps, "pass_weights": pass_weights}
        asked |= {"halting_loss": halting_loss, "multi_token_weight": multi_token_weight, "refinements": refinements}
        asked |= {"track": track, "num_items_in_batch": label_count}
        output = self._forward(tokens[:, :-1], labels, position_ids, pondering_steps, **asked)
        enter("backward")
        self._backward(output.loss)
        return output

    def update(self, accept: Accept | None = None) -> float:
        """Update the weights by the mean gradient of the step's micro-batches, if it is accepted.

        If it is not, weights and moments stay as they are, and the gradients are dropped.

        Args:
            accept: decides by the norm. It must decide alike on all ranks. None accepts every finite norm.

        Returns the norm of the whole mean gradient before clipping, which may be infinite or nan.
        """
        assert self._micro_steps_done == 0, "micro-steps of the step are missing"
        return self._gate.step(self.deepspeed, accept)

    def _forward(
        self,
        tokens: Tensor,  # (B, T)
        labels: Tensor,  # (B, T)
        position_ids: Tensor | None,  # (B, T); if given, attention does not cross documents in any pass
        pondering_steps: int | None = None,
        **asked: Any,  # of the model
    ) -> Any:
        if self._traces is not None:
            self._traces.use((pondering_steps, asked.get("refinements"), torch.is_grad_enabled()))
        tokens, labels = (tensor.to(self.device, non_blocking=True) for tensor in (tokens, labels))
        if position_ids is not None:
            documents = {"position_ids": position_ids, **document_arguments(self.module, position_ids)}
            tensors = {name: value for name, value in documents.items() if isinstance(value, Tensor)}
            asked |= documents | {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        return self.deepspeed(
            input_ids=tokens,
            shift_labels=labels,
            skip_logits=True,
            pondering_steps=pondering_steps,
            z_loss=self._z_loss if torch.is_grad_enabled() else 0.0,
            backward_passes=self._backward_passes if torch.is_grad_enabled() else None,
            **asked,
        )

    def _backward(self, loss: Tensor) -> None:
        self._micro_steps_done = (self._micro_steps_done + 1) % self.micro_steps
        # DeepSpeed counts micro-steps since the start, modulo those of a step, which is wrong once the batch changes.
        self.deepspeed.set_gradient_accumulation_boundary(self._micro_steps_done == 0)
        self.deepspeed.backward(loss)
        self._trim_module_stack()
        if self._micro_steps_done > 0:
            self.deepspeed.step()  # between micro-steps this only counts

    @property
    def updated(self) -> bool:
        """Whether the last step updated the weights."""
        return self._gate.opened

    def average_weights(self, step: int) -> None:
        """Add the weights after this step to their running average, if the run keeps one and the step updated them.

        The average is shorter at first: its decay is at most (1 + n) / (10 + n) at its n-th step.
        """
        if self._ema is None or not self._gate.opened:
            return
        self.average_since = step if self.average_since is None else self.average_since
        number = step - self.average_since + 1
        self.partition.average(min(self._ema, (1 + number) / (10 + number)))

    def restore(
        self, parts: Parts, scalars: Scalars, average_since: int | None, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Load weights and states from a checkpoint of any number of ranks and any stage. Collective.

        Args:
            average_since: the first step in the checkpoint's average of the weights. None if it has none, or a frozen
                one. If this run keeps no average, it is dropped, because continuing it later would leave a gap.
            alive: called for each weight.
        """
        self.average_since = None if self._ema is None else average_since
        self.partition.restore(parts, scalars, average=self.average_since is not None, alive=alive)

    @torch.no_grad()
    def predict(self, tokens: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> Any:
        """The model's output on tokens (B, T), without gradient and dropout.

        Args:
            labels: (B, T), the next token of each token.
            position_ids: (B, T), from 0 in each document. If given, attention does not cross documents in any pass.
        """
        self.deepspeed.eval()
        output = self._forward(tokens, labels, position_ids)
        self.deepspeed.train()
        self._trim_module_stack()
        return output

    def end_evaluation(self) -> None:
        """Partition the weights again, because ZeRO-3 keeps them gathered after a forward without backward."""
        if self.zero_stage == 3:
            self.deepspeed.empty_partition_cache()

    def peak_flops(self) -> float | None:
        """The dense bf16 FLOP/s of all devices together. None on CPUs and on unknown devices."""
        if self.device.type != "cuda":
            return None
        each = peak_flops(torch.cuda.get_device_name(self.device))
        return None if each is None else each * self.world_size

    def totals(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sums of flat tensors over the ranks, on the CPU, in one all-reduce. Collective."""
        return self.total(torch.cat(values)).split([part.numel() for part in values])

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, on the CPU. Collective."""
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def mean(self, counts: Sequence[int]) -> Tensor:
        """The mean of counts over all ranks, on the device. Each rank gives the same number of counts. Collective."""
        mean = torch.tensor(counts, dtype=torch.float64).mean().float().to(self.device)
        dist.all_reduce(mean)
        return mean / self.world_size

    def agree_on(self, pondering_steps: int) -> int:
        """Check that every rank has the same number of pondering steps, and return it. Collective.

        Raises:
            RuntimeError: the numbers differ. ZeRO-3 would crash or hang, and stages 0 to 2 would silently train on.
        """
        extremes = torch.tensor([pondering_steps, -pondering_steps], device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        highest, lowest = int(extremes[0]), -int(extremes[1])
        if highest != lowest:
            raise RuntimeError(f"rank {self.rank} ponders {pondering_steps} steps, others {lowest} to {highest}")
        return pondering_steps

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        return from_first_rank(value)

    def _trim_module_stack(self) -> None:
        # Recomputation stops a forward early, so its post-forward hooks do not pop this global list. It would grow
        # forever, by every recomputed module. Between micro-steps only the root belongs in it.
        if self.zero_stage == 3:
            parameter_offload.FWD_MODULE_STACK[:] = [self.module]


def _refuse_without_cuda(zero: dict[str, Any], name: str) -> None:
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(key) and not torch.cuda.is_available():
            raise ConfigError(f"{name}: zero_optimization.{key} needs CUDA, for its kernels; use zero3_bounded here")
