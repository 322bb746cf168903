"""Export a universal checkpoint of DeepSpeed as a Hugging Face folder.

Use it if another program has trained one of our models. Our own runs do not need it, because their checkpoints have
one format for every stage and number of ranks. `python -m deepspeed.checkpoint.ds_to_universal` makes a universal
checkpoint. It is read here without DeepSpeed, and only for its weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ponder_scale.checkpoint.weights import model_weights
from ponder_scale.export.card import model_card
from ponder_scale.export.folder import meta_model, write_folder
from ponder_scale.setup.warm_start import folder_configuration
from ponder_scale.shards.manifest import tokenizer_identity

logger = logging.getLogger(__name__)


def is_universal(source: Path) -> bool:
    """Whether a folder has the layout of a universal checkpoint."""
    return (source / "zero").is_dir()


def read_universal(source: Path, like: Path) -> tuple[Any, Iterator[tuple[str, Tensor]]]:
    """The configuration of the Hugging Face folder `like`, and the weights of `source`. Raises like `model_weights`."""
    configuration = folder_configuration(like)
    return configuration, model_weights(meta_model(configuration), source)


def export_universal(
    source: Path, out: Path, *, like: Path, dtype: str = "float32", licence: str | None = None
) -> Path:
    """Make the folder `out` from a universal checkpoint. Returns `out`.

    Args:
        like: Hugging Face folder with the model's config.json and tokenizer.

    Raises:
        CheckpointError: the weights are not of the model of `like`, or `out` exists.
    """
    configuration, weights = read_universal(source, like)
    facts = {"converted from": f"{source.name}, a universal checkpoint of DeepSpeed"}
    parameters = write_folder(
        out,
        configuration,
        weights,
        dtype=dtype,
        card=lambda count: model_card(out.name, configuration, count, facts, licence),
        tokenizer=like if tokenizer_identity(like) else None,
    )
    logger.info("exported %s (%s parameters, %s) to %s", source, f"{parameters:,}", dtype, out)
    return out
