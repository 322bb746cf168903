"""A gate before the optimizer update. It opens if the gradient norm is accepted. If not, the step leaves no trace.

    stage and precision         what is intercepted                     how DeepSpeed is told of a refusal
    0, fp32                     engine.clip_fp32_gradients, step        neither is called
    0, bf16                     overflow_checker.check                  there is an overflow
    1 and 2                     scaled_global_norm                      the norm is -1
    1, bf16 added up in fp32    get_grads_for_norm                      the gradient is one infinite number
    3                           _get_norm_groups                        the norm is -1
    3, Muon                     _apply_muon_to_accumulated_grads        it is not called, then the norm is -1

DeepSpeed computes the norm in its `step` and updates at once. It can skip an update, which it needs for overflows in
fp16. Then it drops every gradient and accumulation buffer, and touches neither weights nor moments. Each of its
optimizers takes this decision somewhere, and that place is made to ask the gate. A version of DeepSpeed that decides
elsewhere would not ask and would train on without judgement. So a step for which DeepSpeed did not ask ends the run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from ponder_scale.errors import UserError
from ponder_scale.train.zero.deepspeed_version import TESTED

Accept = Callable[[float], bool]


class Gate:
    """The gate before the update of a DeepSpeed engine.

    Args:
        version: DeepSpeed's version, for error messages.
        plain: the engine has neither a ZeRO nor a bf16 wrapper (stage 0 in fp32).

    Raises:
        UserError: this version of DeepSpeed has no such decision to intercept.
    """

    def __init__(self, engine: Any, zero_stage: int, version: str, *, plain: bool) -> None:
        self.norm = 0.0  # norm of the last step's mean gradient, before clipping
        self.opened = True  # whether the last step was accepted
        self._accept: Accept | None = None
        self._asked = False  # whether DeepSpeed asked in the last step
        self._version, self._plain = version, plain
        try:
            self._guard(engine, zero_stage)
        except AttributeError as error:
            raise self._unknown(f"has no {error.name} at which to judge a gradient") from error

    def step(self, engine: Any, accept: Accept | None) -> float:
        """Call `engine.step()` at the end of a step and update if the norm is accepted. Returns the norm.

        Args:
            accept: decides by the norm of the mean gradient, which is the same on all ranks. None accepts every
                finite norm.

        Raises:
            UserError: DeepSpeed did not ask, or did not do as it was told. The step must not be saved.
        """
        self._accept, self._asked = accept, False
        engine.step()
        self._accept = None
        if not self._asked:
            raise self._unknown("updated the weights without asking whether the gradient is accepted")
        # Without a wrapper DeepSpeed does not know of refusals, and the update itself is intercepted instead.
        if not self._plain and engine.was_step_applied() != self.opened:
            did = "refused an update that was accepted" if self.opened else "made an update that was refused"
            raise self._unknown(did)
        return self.norm

    def _guard(self, engine: Any, zero_stage: int) -> None:
        optimizer = engine.optimizer
        if self._plain:
            self._guard_plain(optimizer, engine)
        elif zero_stage == 0:
            self._guard_bf16(optimizer)
        elif zero_stage == 3:
            muon = "Muon" in type(engine.basic_optimizer).__name__
            self._guard_stage_3(optimizer, engine.device, muon=muon)
        elif hasattr(optimizer, "get_grads_for_norm"):
            self._guard_fp32_accumulation(optimizer)
        else:
            self._guard_stages_1_and_2(optimizer)

    def _unknown(self, what: str) -> UserError:
        return UserError(
            f"deepspeed {self._version} {what}, unlike the versions that were tested; the step was not saved; install "
            f"deepspeed=={TESTED[-1]} and start again"
        )

    def _opens(self, norm: Any) -> bool:
        self._asked = True
        self.norm = float(norm)
        if self.norm < 0:  # DeepSpeed's sign for a norm that is not a number
            self.norm = math.nan
        self.opened = math.isfinite(self.norm) if self._accept is None else self._accept(self.norm)
        assert not self.opened or math.isfinite(self.norm)
        return self.opened

    def _guard_stage_3(self, optimizer: Any, device: torch.device, *, muon: bool) -> None:
        groups_of = optimizer._get_norm_groups

        def judge() -> list[Any]:
            groups = groups_of()  # one norm for each parameter group, negative if it is not a number
            norms = torch.stack([torch.as_tensor(norm, dtype=torch.float32, device=device) for norm in groups])
            finite = bool((torch.isfinite(norms) & (norms >= 0)).all())
            return groups if self._opens(torch.linalg.vector_norm(norms) if finite else math.nan) else [-1.0]

        def norm_groups() -> list[Any]:
            if not muon:
                return judge()
            return groups_of() if self.opened else [-1.0]

        optimizer._get_norm_groups = norm_groups
        if muon:
            apply_muon = optimizer._apply_muon_to_accumulated_grads

            def muon_updates() -> None:
                # Muon's updates advance the momentum, so gradients must be judged before they become updates.
                judge()
                if self.opened:
                    apply_muon()

            optimizer._apply_muon_to_accumulated_grads = muon_updates

    def _guard_stages_1_and_2(self, optimizer: Any) -> None:
        norm_of = optimizer.scaled_global_norm

        def global_norm(norm_type: int = 2) -> Any:
            norm = norm_of(norm_type)
            return norm if self._opens(norm / optimizer.loss_scale) else torch.full_like(norm, -1.0)

        optimizer.scaled_global_norm = global_norm
        # In bf16, DeepSpeed asks only if it also looks for overflows. That extra pass over all gradients is not needed,
        # because the norm shows overflows, too.
        optimizer.check_grad_overflow = True
        optimizer.check_overflow = lambda partition_gradients=True: None

    def _guard_fp32_accumulation(self, optimizer: Any) -> None:
        """Guard stage 1 in bf16 with `data_types.grad_accum_dtype: fp32`, which has its own wrapper."""
        gradients_of = optimizer.get_grads_for_norm
        norm_of = sys.modules[type(optimizer).__module__].get_global_norm_of_tensors

        def gradients(for_clipping: bool = False) -> Any:
            found = gradients_of(for_clipping=for_clipping)
            if for_clipping:
                return found
            norm = norm_of(input_tensors=found[0], mpu=optimizer.mpu, norm_type=optimizer.norm_type)
            if self._opens(norm):
                return found
            return [torch.full((1,), math.inf, device=found[0][0].device)], found[1]  # DeepSpeed drops it

        optimizer.get_grads_for_norm = gradients

    def _guard_bf16(self, optimizer: Any) -> None:
        def overflow() -> bool:
            gradients = [p.grad for group in optimizer.fp16_groups for p in group if p.grad is not None]
            # torch.nn.utils.get_total_norm would round each norm and their total to the eight bits of the gradients.
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            return not self._opens(torch.linalg.vector_norm(torch.stack(norms)))

        optimizer.overflow_checker.check = overflow

    def _guard_plain(self, optimizer: Any, engine: Any) -> None:
        clip, update = engine.clip_fp32_gradients, optimizer.step

        def judge() -> None:
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            self._opens(torch.nn.utils.get_total_norm(gradients))

        def clip_fp32_gradients() -> None:
            judge()
            if self.opened:
                clip()

        def step(*arguments: Any, **options: Any) -> Any:
            if not engine.gradient_clipping():
                judge()
            if not self._asked:
                raise self._unknown("clipped the gradient without asking whether it is accepted")
            return update(*arguments, **options) if self.opened else None

        engine.clip_fp32_gradients = clip_fp32_gradients
        optimizer.step = step
