"""Find the part of the weights and the optimizer's states that this rank holds, by parameter and range.

DeepSpeed's own checkpoints are pickles of its objects, tied to the number of ranks and the stage. Here the fp32 masters
and the optimizer's states have names and ranges. So they can be saved, and any other partition finds them again:

    stage 0     every rank has everything; a save deals it out evenly over the ranks
    stage 1, 2  each parameter group is one flat tensor, cut into equal pieces that may end inside a parameter
    stage 3     each parameter is cut into equal shares, and the last one is padded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ponder_scale.checkpoint.parts import AVERAGE, WEIGHT, Parts
from ponder_scale.errors import ConfigError

Scalars = Mapping[
    str, float | Mapping[str, float]
]  # of the optimizer, by name: one number for all parameters, or one for each


class Owned(NamedTuple):
    """Elements [begin, begin + length) of a flattened parameter, at `start` of a tensor that the optimizer updates."""

    name: str
    begin: int
    length: int
    master: Tensor
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """This stretch (length,) of a tensor laid out as the master."""
        return flat.detach().view(-1)[self.start : self.start + self.length]


class Partition:
    """This rank's stretches of a ZeRO engine's weights and optimizer states.

    Args:
        engine: DeepSpeed's engine, not trained yet.
        stage: ZeRO stage, 0 to 3.

    Raises:
        ConfigError: the sharding moves or reorders the masters, so that they are not found.
    """

    def __init__(self, engine: Any, stage: int, rank: int, world_size: int) -> None:
        self._engine, self._stage = engine, stage
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        owned = {0: _whole, 1: _cut_groups, 2: _cut_groups}.get(stage, _cut_parameters)(engine, names, rank)
        self._owned = [stretch for stretch in owned if stretch.length]
        self._check(names)
        self._saved = self._owned if stage else _dealt_out(self._owned, rank, world_size)

    def tensors(self, *, copy: bool) -> dict[str, Tensor]:
        """The tensors that this rank saves, for `write_part`. With `copy` they are copies on the host, else views.

        Copies wait for the device once, at the end.
        """
        tensors = {}
        for owned in self._saved:
            for kind, flat in ((WEIGHT, owned.master), *self._states(owned.master).items()):
                tensors[f"{kind}/{owned.name}"] = _to_host(owned.of(flat)) if copy else owned.of(flat)
        if copy and torch.cuda.is_available():
            torch.cuda.synchronize()
        return tensors

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move a running average of the masters towards the masters. It starts as a copy of them.

        The average is one more state of the optimizer, cut like the masters. So it is saved, resumed and partitioned
        anew like the other states. Call it after an update, which makes the optimizer's own states.
        """
        for master in {id(owned.master): owned.master for owned in self._owned}.values():
            state = self._engine.basic_optimizer.state.get(master)
            if not state:
                continue  # no update yet: with the average in its state, an optimizer would not make its own states
            if AVERAGE in state:
                state[AVERAGE].lerp_(master, 1.0 - decay)
            else:
                state[AVERAGE] = master.detach().clone()

    def begins(self) -> dict[str, int]:
        """The first element of each stretch that this rank saves, by parameter."""
        return {owned.name: owned.begin for owned in self._saved}

    def scalars(self) -> Scalars:
        """The optimizer's states that are one number, such as its step.

        There is one number for all parameters. Where they differ, as in Muon's AdamW, which counts each parameter's own
        steps, there is one for each parameter. Only parameters of this rank are in it. Under the stages that Muon
        supports, these are all parameters.
        """
        found: dict[str, dict[str, float]] = {}
        for owned in self._owned:
            for name, value in self._engine.basic_optimizer.state.get(owned.master, {}).items():
                if not _is_layout_of(value, owned.master):
                    found.setdefault(name, {})[owned.name] = float(value)
        return {
            name: next(iter(values.values())) if len(set(values.values())) == 1 else values
            for name, values in found.items()
        }

    def shapes(self) -> dict[str, list[int]]:
        """The shapes of all parameters, in the order of the model."""
        named = self._engine.module.named_parameters()
        return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}

    def needs(self) -> dict[str, tuple[int, int]]:
        """The first element and the number of elements that this rank keeps, by parameter."""
        return {owned.name: (owned.begin, owned.length) for owned in self._owned}

    def is_in(self, parts: Parts) -> bool:
        """Whether `parts` are enough to restore this rank."""
        return all(
            parts.has(kind, owned.name, owned.begin, owned.length)
            for owned in self._owned
            for kind in (WEIGHT, *parts.kinds(owned.name))
        )

    @torch.no_grad()
    def restore(
        self, parts: Parts, scalars: Scalars, *, average: bool = True, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Load weights and states from a checkpoint of any number of ranks and any stage. Collective.

        Args:
            average: also load the running average of the weights.
            alive: called for each weight.
        """
        left = (WEIGHT,) if average else (WEIGHT, AVERAGE)
        if self._stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()  # releases gathered weights
        for owned in self._owned:
            alive()
            kinds = [kind for kind in parts.kinds(owned.name) if kind not in left]
            own = {
                name: value[owned.name] if isinstance(value, Mapping) else value
                for name, value in scalars.items()
                if not isinstance(value, Mapping) or owned.name in value
            }
            states = self._made_states(owned.master, kinds, own)
            for kind, flat in ((WEIGHT, owned.master), *states.items()):
                parts.read(kind, owned.name, owned.begin, owned.of(flat))
        self._update_low_precision()

    def _check(self, names: Mapping[Any, str]) -> None:
        """Check the layout that is assumed here: before training, each master must equal its weight."""
        weights = {name: parameter for parameter, name in names.items()}
        for owned in self._owned:
            weight = weights[owned.name]
            if self._stage == 3:
                mine = weight.ds_tensor.detach().view(-1)[: owned.length]
            else:
                mine = weight.detach().view(-1)[owned.begin : owned.begin + owned.length]
            master = owned.of(owned.master)
            if master.shape != mine.shape or not torch.equal(master, mine.to(master)):
                raise ConfigError(
                    f"train.deepspeed: the fp32 master of {owned.name} is not where it can be saved from; remove "
                    "what can move or reorder optimizer states: nvme, zenflow, super_offload, round_robin_gradients"
                )

    def _states(self, master: Tensor) -> dict[str, Tensor]:
        states = self._engine.basic_optimizer.state.get(master, {})
        return {name: value for name, value in states.items() if _is_layout_of(value, master)}

    def _made_states(self, master: Tensor, kinds: list[str], scalars: Mapping[str, float]) -> dict[str, Tensor]:
        """The optimizer's states of a master. States that it does not have yet are made."""
        optimizer = self._engine.basic_optimizer
        state = optimizer.state[master]
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(master, memory_format=torch.preserve_format)
        for name, value in scalars.items():
            if isinstance(state.get(name), Tensor):
                state[name].fill_(value)
            elif isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__module__.startswith("torch."):
                fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
                state[name] = torch.tensor(value, dtype=torch.float32, device=master.device if fused else "cpu")
            else:
                state[name] = int(value)  # DeepSpeed's optimizers and most others count in integers
        return {kind: state[kind] for kind in kinds}

    def _update_low_precision(self) -> None:
        """Copy the masters to the weights that the model computes with."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            for halves, masters in zip(
                getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
            ):
                for half, master in zip(halves, masters, strict=True):
                    half.copy_(master)
        elif self._stage < 3:
            optimizer.update_lp_params()
        else:
            for master, flat, group in zip(
                optimizer.fp32_partitioned_groups_flat,
                optimizer.fp16_partitioned_groups_flat,
                optimizer.fp16_partitioned_groups,
                strict=True,
            ):
                flat.copy_(master)
                for half, updated in zip(group, optimizer.unflatten(flat, group), strict=True):
                    half.data = updated.data
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.checkpoint_event_epilogue()


def _whole(engine: Any, names: Mapping[Any, str], rank: int) -> Iterator[Owned]:
    wrapper = engine.optimizer
    masters = dict(
        zip(_flat(getattr(wrapper, "fp16_groups", ())), _flat(getattr(wrapper, "fp32_groups", ())), strict=True)
    )
    for parameter, name in names.items():
        yield Owned(name, 0, parameter.numel(), masters.get(parameter, parameter), 0)


def _cut_groups(engine: Any, names: Mapping[Any, str], rank: int) -> Iterator[Owned]:
    optimizer = engine.optimizer
    # If gradients accumulate in another precision than the weights', another wrapper is used, with another name.
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for parameter, name in names.items():
        fragment = parameter._hp_mapping
        if fragment is not None:  # this rank holds a piece of it
            place = fragment.hp_fragment_address
            master = masters[fragment.param_group_index]
            yield Owned(name, fragment.lp_fragment_address.start, place.numel, master, place.start)


def _cut_parameters(engine: Any, names: Mapping[Any, str], rank: int) -> Iterator[Owned]:
    optimizer = engine.optimizer
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in group:
            share = parameter.partition_numel()
            begin = rank * share
            yield Owned(names[parameter], begin, max(0, min(share, parameter.ds_numel - begin)), master, start)
            start += share


def _dealt_out(whole: list[Owned], rank: int, world_size: int) -> list[Owned]:
    """This rank's share of stretches that every rank has, dealt out evenly."""
    total = sum(owned.length for owned in whole)
    first, end = total * rank // world_size, total * (rank + 1) // world_size
    share, position = [], 0
    for owned in whole:
        begin, stop = max(first - position, 0), min(end - position, owned.length)
        if begin < stop:
            share.append(owned._replace(begin=begin, length=stop - begin, start=begin))
        position += owned.length
    return share


def _flat(groups: Any) -> list[Any]:
    return [item for group in groups for item in group]


def _is_layout_of(value: Any, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == master.shape


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
