"""Convert folders of the published code to our format, and back.

The published code is LUMIA-Group/PonderingLM and, for LLaMA, its follow-up. `setup.warm_start` reads its configuration.
Its GPT-NeoX calls the head `embed_out`, and has an `adapter.weight` that it does not use.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ponder_scale.checkpoint.weights import model_weights
from ponder_scale.errors import CheckpointError
from ponder_scale.export.card import model_card
from ponder_scale.export.folder import making, meta_model, write_folder
from ponder_scale.export.tokenizer import copy_file, read_json, tokenizer_config, write_config
from ponder_scale.export.writer import write_safetensors
from ponder_scale.model.configuration import PONDERING_FIELDS
from ponder_scale.setup.build import ARCHITECTURES, configuration_from_dict
from ponder_scale.setup.warm_start import HEADS, NOT_THE_MODEL, folder_configuration, read_configuration

logger = logging.getLogger(__name__)

CLASSES = {"llama": "LlamaForCausalLM", "gpt_neox": "GPTNeoXForCausalLM", "gpt2": "GPT2LMHeadModel"}
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def import_reference(
    source: Path, out: Path, *, dtype: str = "float32", licence: str | None = None, latent: bool = False
) -> Path:
    """Convert a folder of the published code to our format. Makes the folder `out` and returns it.

    `source` may also be our own folder from an export by another version. `out` then has the code of this version.

    Args:
        latent: take a folder whose keys PonderLM-2 and its baselines share for PonderLM-2.

    Raises:
        CheckpointError: the architecture is not one of the published code, or the settings mean another model.
    """
    values = read_configuration(source)
    architecture = values.get("model_type")
    if architecture not in (*CLASSES, *(each.configuration.model_type for each in ARCHITECTURES.values())):
        raise CheckpointError(
            f"{source / 'config.json'}: model_type is {architecture!r}; expected one of {', '.join(CLASSES)}, or that "
            "of a folder that ponder-scale exported"
        )
    configuration = folder_configuration(source, latent=latent)
    has_tokenizer = any((source / name).is_file() for name in TOKENIZER_FILES)
    parameters = write_folder(
        out,
        configuration,
        model_weights(meta_model(configuration), source),
        dtype=dtype,
        card=lambda count: model_card(out.name, configuration, count, {"imported from": source.name}, licence),
        tokenizer=source if has_tokenizer else None,
    )
    logger.info(
        "imported %s (%s, S = %d, %s parameters) to %s",
        source,
        architecture,
        configuration.pondering_steps,
        f"{parameters:,}",
        out,
    )
    if not has_tokenizer:
        logger.info("%s has no tokenizer; add tokenizer.json and tokenizer_config.json to %s", source, out)
    return out


def export_reference(source: Path, out: Path) -> Path:
    """Convert an exported folder to a folder that the published code reads. Makes `out`, in fp32, and returns it.

    Raises:
        CheckpointError: `source` is not one of our folders, or ponders in a way that the published code cannot.
    """
    values = read_configuration(source)
    architecture = str(values.get("model_type")).removeprefix("ponder_")
    if architecture not in CLASSES or architecture == values["model_type"]:
        known = ", ".join(f"ponder_{name}" for name in CLASSES)
        raise CheckpointError(
            f"{source / 'config.json'}: model_type is {values.get('model_type')!r}; expected one of {known}"
        )
    configuration = configuration_from_dict(values)
    if configuration.extra_heads:
        logger.warning(
            "%s: its %d extra heads are left out, because the published code has none; they only draft, so the text "
            "stays the same",
            *(source, configuration.extra_heads),
        )
        configuration.extra_heads = 0
    keys = published_keys(architecture, configuration)
    model = meta_model(configuration)
    shapes = {_published_name(architecture, name): parameter.shape for name, parameter in model.named_parameters()}
    unused = {}
    if architecture == "gpt_neox":
        unused["adapter.weight"] = torch.Size((configuration.hidden_size, 2 * configuration.hidden_size))

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model_weights(model, source, dropped=(HEADS,)):
            yield _published_name(architecture, name), tensor
        for name, shape in unused.items():
            yield name, torch.zeros(shape)

    stock = {
        key: value for key, value in configuration.to_dict().items() if key not in (*NOT_THE_MODEL, *PONDERING_FIELDS)
    }
    known = GenerationConfig().to_dict().keys()  # other keys may name code to run
    with making(out) as folder:
        write_safetensors(folder, shapes | unused, weights(), torch.float32)
        content = {**stock, "model_type": architecture, "architectures": [CLASSES[architecture]], **keys}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in TOKENIZER_FILES:
            copy_file(source, name, folder)
        if described := tokenizer_config(source):
            write_config(folder, described)
        if generation := {key: value for key, value in read_json(source, GENERATION).items() if key in known}:
            (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    logger.info("exported %s to %s, for the published code", source, out)
    return out


def published_keys(architecture: str, configuration: Any) -> dict[str, Any]:
    """The published code's keys for one of our configurations.

    Raises:
        CheckpointError: the published code has no key for a field.
    """
    steps, scale = configuration.pondering_steps, configuration.initial_scale
    refused = {
        "feedback": configuration.feedback != "embedding",
        "pondering_top_k": configuration.pondering_top_k is not None,
        "initial_scale": scale not in (1.0, float(steps)),
        "pondering_temperature": architecture == "gpt_neox" and configuration.pondering_temperature != 1.0,
        "halting": configuration.halting != "none",
        "residual": configuration.residual == "replace"
        or (configuration.residual == "restart" and (architecture != "llama" or scale != 1.0)),
    }
    for field, cannot in refused.items():
        if cannot:
            value = getattr(configuration, field)
            raise CheckpointError(f"{field} is {value!r}, which the published {architecture} cannot express")
    if configuration.residual == "restart":
        if configuration.pondering_temperature != 1.0:
            raise CheckpointError(
                f"pondering_temperature is {configuration.pondering_temperature}; expected 1.0, because the published "
                "code has no temperature for residual 'restart'"
            )
        switches = {"recurrent_model": True, "num_latent_thoughts": steps, "residual_interpolated_embeds": False}
        return {**switches, "scale_embeds": configuration.scale_embeds}
    return {
        "ponderinglm": True,
        "recurrent_model": architecture == "gpt2",
        "pondering_steps": steps,
        "scale_embeds": configuration.scale_embeds,
        "mutiply_pondering_steps": scale != 1.0,
        "softmax_temperature": configuration.pondering_temperature,
    }


def _published_name(architecture: str, name: str) -> str:
    return "embed_out.weight" if architecture == "gpt_neox" and name == "lm_head.weight" else name
