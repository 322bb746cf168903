"""The workload of `step`, `memory` and `decode`: a model of some shape on random tokens, trained with AdamW."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.measure import check_dtype, check_numbers
from ponder_scale.config import ModelConfig, load_recipe
from ponder_scale.errors import ConfigError
from ponder_scale.planning.cost import RECOMPUTED_FORWARDS, Shape
from ponder_scale.planning.shape import model_shape
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.setup.device import default_device
from ponder_scale.setup.recompute import apply_recompute

PUBLISHED = "published"
POLICIES = tuple(RECOMPUTED_FORWARDS)


@dataclass(frozen=True)
class Workload:
    """A model, its micro-batch, and the device."""

    model: ModelConfig = field(default_factory=ModelConfig)
    batch: int = 4
    seq_len: int = 512
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens trained in one step."""
        return self.batch * self.seq_len

    @property
    def shape(self) -> Shape:
        """The model's shape, from which its costs are computed."""
        return model_shape(self.configuration(), self.seq_len)

    def configuration(self) -> Any:
        """The model's configuration for transformers."""
        assert self.model.vocab_size is not None
        return model_configuration(self.model, vocab_size=self.model.vocab_size, seq_len=self.seq_len, eod_id=0)

    def build(self) -> Any:
        """The model with its initial weights, on the device."""
        with torch.device(self.device):  # a GPU draws a billion weights quickly, a processor takes half a minute
            return build_model(self.configuration(), seed=0).to(getattr(torch, self.dtype))

    def sequences(self, batch: int | None = None) -> Tensor:
        """Random tokens, one more than is trained per sequence, (batch, seq_len + 1)."""
        generator = torch.Generator().manual_seed(0)
        size = (batch or self.batch, self.seq_len + 1)
        return torch.randint(0, self.model.vocab_size or 0, size, generator=generator).to(self.device)

    def without_size(self) -> Workload:
        """A tiny version of the workload, for memory that libraries allocate once for themselves."""
        model = replace(
            self.model,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_key_value_heads=None,
            num_hidden_layers=1,
            vocab_size=64,
        )
        return replace(self, model=model, batch=1, seq_len=16)

    def line(self) -> str:
        """A description for the head of a table."""
        model = self.model
        return (
            f"{model.architecture} D {model.hidden_size}, L {model.num_hidden_layers}, V {model.vocab_size}, "
            f"{self.batch} x {self.seq_len} tokens, {self.dtype}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values to pass to another process. `from_dict` reads them back."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Workload:
        """Rebuild a workload from the values of `to_dict`."""
        return Workload(**{**values, "model": ModelConfig(**values["model"])})


def workload(
    *,
    recipe: str | None,
    hidden: int,
    layers: int,
    vocab: int,
    pondering_steps: int,
    dtype: str,
    batch: int = 1,
    seq_len: int = 512,
    device: str | None = None,
) -> Workload:
    """A LLaMA of the given shape, or a recipe's model with its sequence length. Uses the GPU if there is one.

    Raises:
        ConfigError: a number below 1, an unsupported dtype, or a recipe that the published way cannot run.
    """
    check_numbers(batch=batch, seq_len=seq_len, hidden=hidden, layers=layers, vocab=vocab)
    check_dtype(dtype)
    device = device or default_device()
    if recipe is not None:
        config = load_recipe(recipe)
        if config.model.feedback != "embedding" or config.model.residual == "replace":
            raise ConfigError(
                f"--recipe: its model has feedback {config.model.feedback} and residual {config.model.residual}; "
                "expected feedback embedding and residual accumulate or restart, as the published way has"
            )
        model = replace(config.model, vocab_size=config.model.vocab_size or vocab)
        return Workload(model, batch, config.data.seq_len, dtype, device)
    model = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=8 * round(hidden * 2.6875 / 8),  # the same ratio as in LLaMA 7B
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        pondering_steps=pondering_steps,
    )
    return Workload(model, batch, seq_len, dtype, device)


class Training:
    """Optimizer steps on one model. Each step uses one variant: the published way or a recomputation policy.

    Weights of less than 32 bits have fp32 masters, as in training.
    """

    def __init__(self, work: Workload) -> None:
        self.work, self.model = work, work.build()
        self._weights = list(self.model.parameters())
        wide = work.dtype == "float32"
        self._masters = self._weights if wide else [weight.detach().float() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-4, fused=work.device == "cuda")

    def rate(self, rate: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def loss(
        self, variant: str, pondering_steps: int, batch: int | None = None, sequences: Tensor | None = None
    ) -> Tensor:
        """The loss of `sequences` (B, T + 1), with its graph. The default is `batch` random ones, or the workload's
        number.
        """
        sequences = self.work.sequences(batch) if sequences is None else sequences
        tokens, labels = sequences[:, :-1], sequences[:, 1:]
        if variant == PUBLISHED:
            apply_recompute(self.model, "none")
            return published.loss(self.model, tokens, labels, pondering_steps)
        apply_recompute(self.model, variant)
        steps = {"pondering_steps": pondering_steps, "skip_logits": True}
        return self.model(input_ids=tokens, shift_labels=labels, **steps).loss

    def step(
        self, variant: str, pondering_steps: int, batch: int | None = None, sequences: Tensor | None = None
    ) -> float:
        """Run one optimizer step and return its loss."""
        loss = self.loss(variant, pondering_steps, batch, sequences)
        loss.backward()
        if self._masters is not self._weights:
            for master, weight in zip(self._masters, self._weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
        return loss.item()
