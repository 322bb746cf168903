"""Export a checkpoint as a Hugging Face folder, without a GPU and without DeepSpeed.

Only about one tensor is in memory at a time.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ponder_scale.checkpoint.find import find, read_state
from ponder_scale.checkpoint.weights import read_weights
from ponder_scale.export.card import trained_card
from ponder_scale.export.folder import write_folder
from ponder_scale.runs.records import METRICS, read
from ponder_scale.setup.build import configuration_from_dict

logger = logging.getLogger(__name__)


def export(
    source: Path | str, out: Path | str, *, dtype: str = "float32", licence: str | None = None, average: bool = False
) -> Path:
    """Make the folder `out` from a checkpoint, or from the newest whole checkpoint of a run. Returns `out`.

    Args:
        licence: identifier of the hub for the model card, such as apache-2.0.
        average: export the running average of the weights instead of the weights.

    Raises:
        CheckpointError: there is no whole checkpoint, the weights do not belong to its configuration, or `out` exists.
    """
    folder, out = find(Path(source)), Path(out)
    state = read_state(folder, "step", "tokens", "model", "config")
    parameters = write_folder(
        out,
        configuration_from_dict(state["model"]),
        read_weights(folder, average=average),
        dtype=dtype,
        card=lambda count: trained_card(
            out.name, state, _held_out(folder, state["step"]), count, licence, average=average
        ),
        tokenizer=folder / "tokenizer",
    )
    logger.info("exported %s (step %d, %s parameters, %s) to %s", folder, state["step"], f"{parameters:,}", dtype, out)
    return out


def _held_out(folder: Path, step: int) -> dict[str, Any] | None:
    """The run's last evaluation up to the checkpoint's step. None if the run's metrics are not there any more."""
    metrics = folder.parent.parent / METRICS
    if not metrics.is_file():
        return None
    done = [record for record in read(metrics) if record["event"] == "evaluation" and record["step"] <= step]
    return done[-1] if done else None
