"""Make the dictionary that DeepSpeed takes, from a file of deepspeed_configs/ and the recipe.

The file only says how to shard. DeepSpeed ignores top-level keys that it does not know, so they are checked here. Keys
that belong to the recipe are refused with the reason. So are settings that are known to be wrong with shared passes.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ponder_scale.config import OptimConfig, TrainConfig
from ponder_scale.errors import ConfigError
from ponder_scale.files.shipped import DEEPSPEED_CONFIGS

AUTO = "auto"  # the planner chooses the stage
ALLOWED = (
    "description",
    "zero_optimization",
    "communication_data_type",
    "data_types",
    "zero_allow_untested_optimizer",
    "aio",
    "comms_logger",
)
OF_THE_RECIPE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "steps_per_print": "log.every_steps",
    "wandb": "log.wandb",
}
REFUSED = {
    "activation_checkpointing": "it acts only through DeepSpeed's own checkpointing, which loses gradients of shared "
    "passes under ZeRO-3; set train.recompute",
    "checkpoint": "its writers are not all safe (one writes empty files); checkpoints are configured in the recipe",
    "amp": "it mixes precision behind the master weights; set train.precision",
}
REFUSED_IN_ZERO = {
    "stage3_module_granularity_threshold": "leaf modules lose gradients of shared passes",
    "leaf_module": "leaf modules lose gradients of shared passes",
    "stage3_gather_16bit_weights_on_model_save": "weights are read from the checkpoint by `ponder-scale export`",
}


def read_sharding(name: str) -> dict[str, Any]:
    """The checked contents of a DeepSpeed file, given by path or by its name in deepspeed_configs/.

    Raises:
        ConfigError: there is no such file, it is not JSON, or a key is unknown, belongs to the recipe, or is known to
            be wrong.
    """
    path = find_sharding(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization"), dict):
        raise ConfigError(f"{path}: expected an object with zero_optimization: {{stage: 0 to 3, ...}}")
    for key in values:
        if key in ALLOWED:
            continue
        if key in OF_THE_RECIPE:
            raise ConfigError(f"{path}: {key} belongs to the recipe; remove it here and set {OF_THE_RECIPE[key]}")
        if key in REFUSED:
            raise ConfigError(f"{path}: {key} is refused: {REFUSED[key]}")
        near = difflib.get_close_matches(key, ALLOWED, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; expected one of: {', '.join(ALLOWED)}"
        raise ConfigError(f"{path}: unknown key {key}, which DeepSpeed would silently ignore{hint}")
    for key, reason in REFUSED_IN_ZERO.items():
        if values["zero_optimization"].get(key):
            raise ConfigError(f"{path}: zero_optimization.{key} is refused: {reason}")
    if values["zero_optimization"].get("compute_grad_norm", True) is not True:
        raise ConfigError(
            f"{path}: zero_optimization.compute_grad_norm is refused: without the norm of the gradient, an update "
            "that is not finite would go unnoticed; remove it"
        )
    stage = values["zero_optimization"].get("stage")
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage}; expected 0 to 3")
    values.pop("description", None)
    return values


def shardings(train: TrainConfig, optim: OptimConfig) -> dict[str, dict[str, Any]]:
    """The checked sharding files by name: the file that the run names, or those that `auto` chooses from."""
    names = (train.deepspeed,)
    if train.deepspeed == AUTO:
        names = ("zero0", "zero3") if optim.optimizer == "muon" else ("zero1", "zero2", "zero3")  # type: ignore[assignment]
    return {name: read_sharding(name) for name in names}


def check_ranks(sharding: dict[str, Any], train: TrainConfig, ranks: int) -> None:
    """Raise ConfigError if the batch or ZeRO++'s groups do not divide over the ranks."""
    each = 1 if train.micro_batch == "auto" else train.micro_batch
    if train.batch_unit % (each * ranks):
        key = "global_batch" if train.batch_ramp_from is None else "batch_ramp_from"
        raise ConfigError(
            f"train.{key} is {train.batch_unit}; expected a multiple of train.micro_batch x ranks "
            f"({each} x {ranks} = {each * ranks})"
        )
    group = sharding.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if group != "auto" and ranks % group:
        raise ConfigError(
            f"{train.deepspeed}: zero_optimization.zero_hpz_partition_size is {group}; expected a divisor of the ranks "
            f'({ranks}), or "auto" for the ranks of a node'
        )


def deepspeed_config(
    sharding: dict[str, Any], train: TrainConfig, optim: OptimConfig, world_size: int
) -> dict[str, Any]:
    """The sharding with the recipe's batch sizes, precision and clipping added.

    Raises:
        ConfigError: the global batch does not divide into micro-batches over the ranks.
    """
    check_ranks(sharding, train, world_size)
    if optim.optimizer == "muon":
        sharding = _for_muon(sharding)
    return {
        **sharding,
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch_sequences,
        "gradient_accumulation_steps": train.global_batch // (train.micro_batch_sequences * world_size),
        "gradient_clipping": optim.grad_clip or 0.0,
        "bf16": {"enabled": train.precision == "bf16"},
        "steps_per_print": 2**31 - 1,
        "zero_force_ds_cpu_optimizer": False,
    }


def _for_muon(sharding: dict[str, Any]) -> dict[str, Any]:
    """The sharding changed for Muon, which needs whole matrices, so that it trains as without ZeRO.

    Raises:
        ConfigError: Muon cannot train with this sharding.
    """
    zero = sharding["zero_optimization"]
    if zero["stage"] in (1, 2):
        raise ConfigError(
            f"optim.optimizer is muon with ZeRO stage {zero['stage']}, where its momentum is kept by rank in the "
            "precision of the gradients and cannot be saved; use a train.deepspeed of stage 0 or 3"
        )
    if "offload_optimizer" in zero or "offload_param" in zero:
        raise ConfigError(
            "optim.optimizer is muon with offload, which was not shown to train as without it; use zero3 or zero0"
        )
    if zero.get("zero_quantized_gradients") or zero.get("zero_hpz_partition_size", 1) != 1:  # groups of one are none
        raise ConfigError("optim.optimizer is muon with ZeRO++, but Muon needs whole gradients; use zero3 or zero0")
    # With reduce_scatter a rank sees only its part of a gradient. DeepSpeed itself refuses this under stage 3.
    return {**sharding, "zero_optimization": {**zero, "reduce_scatter": False}}


def find_sharding(name: str) -> Path:
    """The path of the file that `train.deepspeed` names.

    Raises:
        ConfigError: there is no such file.
    """
    for candidate in (Path(name), DEEPSPEED_CONFIGS / name, DEEPSPEED_CONFIGS / f"{name}.json"):
        if candidate.is_file():
            return candidate
    if name == AUTO:
        raise ConfigError("train.deepspeed is auto, but a file is needed here; name a file of deepspeed_configs/")
    known = ", ".join(sorted(path.stem for path in DEEPSPEED_CONFIGS.glob("*.json"))) or "none"
    raise ConfigError(f"train.deepspeed is {name}: no such file; give a path to a JSON file or one of: {known}")
