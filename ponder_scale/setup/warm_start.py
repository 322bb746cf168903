"""Start a run from a Hugging Face folder: translate its configuration into ours, and read its weights.

A folder may come from stock transformers, from our export, or from the published code (LUMIA-Group/PonderingLM and, for
LLaMA, its follow-up). Folders of the published code are stock folders with more keys in config.json. There
`ponderinglm` (for GPT-2 `recurrent_model`) turns pondering on, with `pondering_steps`, `scale_embeds`,
`softmax_temperature` and `mutiply_pondering_steps` [sic], which multiplies e_0 by S. The follow-up has a variant of the
same recurrence, with `recurrent_model`, `num_latent_thoughts` for S, and `residual_interpolated_embeds`. With
`interpolation` false it is PonderLM-2, or one of its baselines, which its config.json does not tell apart.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from ponder_scale.checkpoint.weights import model_weights
from ponder_scale.errors import CheckpointError
from ponder_scale.model.configuration import PONDERING_FIELDS
from ponder_scale.setup.build import ARCHITECTURES, REFUSALS, own_fields
from ponder_scale.shards.manifest import tokenizer_identity

logger = logging.getLogger(__name__)

# the weights of the feedback "both", of halting, and of the feedback "pause"
GATES = ("hidden_gate.", "halting_gates.", "pause_embedding.")
HEADS = "extra_heads."  # the weights of the heads for multi-token prediction

PUBLISHED_KEYS = (
    *("ponderinglm", "recurrent_model", "pondering_steps", "scale_embeds", "mutiply_pondering_steps"),
    *("softmax_temperature", "num_latent_thoughts", "residual_interpolated_embeds", "checkpoint_num_layers"),
    *("interpolation", "interpolation_use_topk", "num_jacobi_iterations", "random_jacobi_iterations"),
)
NOT_THE_MODEL = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")
# Fields that may differ in the run. Shapes are not compared here, but with the weights themselves.
_FREE = {
    *NOT_THE_MODEL,
    *(name for name in PONDERING_FIELDS if name not in ("scale_embeds", "initial_scale")),
    *("vocab_size", "max_position_embeddings", "n_positions", "n_inner", "initializer_range", "use_cache"),
    *("_name_or_path", "pretraining_tp"),
}
_FREE_ENDS = ("_token_id", "dropout", "_drop", "_pdrop")


@torch.no_grad()
def warm_start(model: Any, folder: Path, *, tokenizer: str | None = None) -> None:
    """Load the weights of a Hugging Face folder, pondering or not, into a model on the CPU.

    Args:
        tokenizer: hash of the tokenizer of the run. If the folder has another one, a warning is logged.

    Raises:
        CheckpointError: the weights are of another model, or would compute something else under this configuration:
            another rotary base, activation or scale of the embeddings, for example.
    """
    latent = model.config.feedback == "latent"
    theirs, ours = folder_configuration(folder, latent=latent).to_dict(), model.config.to_dict()
    if theirs["model_type"] != ours["model_type"]:
        names = [values["model_type"].removeprefix("ponder_") for values in (theirs, ours)]
        raise CheckpointError(
            f"{folder}: its architecture is {names[0]}, but model.architecture is {names[1]}; set it to {names[0]}"
        )
    for key in sorted(ours.keys() & theirs.keys() - _FREE):
        if ours[key] != theirs[key] and not key.endswith(_FREE_ENDS):
            raise CheckpointError(
                f"{folder}: its weights were trained with {key} {theirs[key]}, but this run has {ours[key]}; "
                "set the same value (in the recipe's model section, or under model.extra)"
            )
    parameters = dict(model.named_parameters())
    # New gates change little at first. That of "both" is closed, so the run begins with the folder's outputs.
    asked = (theirs["feedback"] == "both", theirs["halting"] != "none", theirs["feedback"] == "pause")
    missing = tuple(name for name, there in zip(GATES, asked, strict=True) if not there)
    kept = min(theirs["extra_heads"], ours["extra_heads"])
    missing += tuple(f"{HEADS}{index}." for index in range(kept, ours["extra_heads"]))
    dropped = tuple(f"{HEADS}{index}." for index in range(kept, theirs["extra_heads"]))
    if dropped:
        logger.warning(
            "%s: its last %d of %d extra heads are left out, because model.extra_heads is %d",
            *(folder, len(dropped), theirs["extra_heads"], kept),
        )
    optional = [name for name in parameters if name.startswith(missing)]
    for name, tensor in model_weights(model, folder, optional=optional, dropped=dropped):
        parameters[name].copy_(tensor)
    if tokenizer is not None and tokenizer_identity(folder) not in (None, tokenizer):
        logger.warning("the tokenizer file in %s is not the one that the shards were made with", folder)


def folder_configuration(folder: Path, *, latent: bool = False) -> Any:
    """Our configuration for a folder's config.json. A folder without pondering gets 0 pondering steps.

    Args:
        latent: see `pondering_fields`.

    Raises:
        CheckpointError: there is no config.json, its architecture is not ours, or its settings mean another model.
    """
    path = folder / "config.json"
    values = read_configuration(folder)
    name = str(values.get("model_type"))
    architecture = name.removeprefix("ponder_")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path}: model_type is {name!r}; expected one of {', '.join(ARCHITECTURES)}")
    try:
        own = name != architecture
        fields = (
            {key: values[key] for key in PONDERING_FIELDS if key in values}
            if own
            else pondering_fields(values, latent=latent)
        )
        dropped = {*PUBLISHED_KEYS, *NOT_THE_MODEL, *PONDERING_FIELDS}
        configuration = ARCHITECTURES[architecture].configuration
        stock = {key: value for key, value in own_fields(configuration, values).items() if key not in dropped}
        return configuration(**stock, **fields)
    except (*REFUSALS, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error


def pondering_fields(values: dict[str, Any], *, latent: bool = False) -> dict[str, Any]:
    """Our fields for the keys of a published config.json.

    Args:
        latent: if its keys may mean PonderLM-2 or one of its baselines, it is PonderLM-2.

    Raises:
        ValueError: the keys mean a model that is not ours, or one of several.
    """
    follow_up = "num_latent_thoughts" in values
    # the published GPT-NeoX does not read recurrent_model here
    recurrent = values.get("recurrent_model") or values["model_type"] == "gpt_neox"
    if follow_up and recurrent and values.get("interpolation") is False:
        if not latent:
            raise ValueError(
                "interpolation is false, as PonderLM-2 writes it, and its loop and pause baselines do so, too; if "
                "these are weights of PonderLM-2, give import-reference --latent, or a run model.feedback=latent"
            )
        scaled = bool(values.get("scale_embeds"))
        fields = {"feedback": "latent", "pondering_steps": int(values["num_latent_thoughts"]), "scale_embeds": scaled}
        return {**fields, "initial_scale": math.sqrt(2.5) if scaled else 1.0}
    if not (values.get("recurrent_model") or (values.get("ponderinglm") and not follow_up)):
        if follow_up:
            raise ValueError(
                "num_latent_thoughts is set without recurrent_model; latent thoughts as extra positions make another "
                "model, which cannot be imported"
            )
        return {"pondering_steps": 0}
    if follow_up and values["model_type"] != "llama":
        raise ValueError(
            f"num_latent_thoughts is set for a {values['model_type']} that feeds back no latents; this baseline of "
            "PonderLM-2 adds hidden states, which cannot be imported"
        )
    steps = int(values["num_latent_thoughts" if follow_up else "pondering_steps"])
    multiplied = bool(values.get("mutiply_pondering_steps"))
    if multiplied and steps == 0:
        raise ValueError("mutiply_pondering_steps with 0 steps multiplies the embeddings by 0; set it to false")
    # the published GPT-NeoX never reads its temperature
    reads_temperature = values["model_type"] != "gpt_neox"
    return {
        "pondering_steps": steps,
        "scale_embeds": bool(values.get("scale_embeds")),
        "initial_scale": float(steps) if multiplied else 1.0,
        "pondering_temperature": float(values.get("softmax_temperature") or 1.0) if reads_temperature else 1.0,
        "residual": "restart" if follow_up and not values.get("residual_interpolated_embeds") else "accumulate",
    }


def read_configuration(folder: Path) -> dict[str, Any]:
    """The contents of a folder's config.json. Raises CheckpointError if it cannot be read."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; expected a Hugging Face folder") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected keys and values")
    return content
