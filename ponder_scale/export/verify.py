"""Check, in a fresh process, that an exported folder computes the same as its checkpoint."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ponder_scale.checkpoint.find import find, read_state
from ponder_scale.checkpoint.weights import read_weights
from ponder_scale.errors import CheckpointError
from ponder_scale.export.universal import read_universal
from ponder_scale.setup.build import configuration_from_dict, model_class

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # for logits of two processes in fp32, after rounding the weights to the export's dtype


def verify_in_fresh_process(
    source: Path, folder: Path, *, dtype: str, average: bool = False, like: Path | None = None
) -> None:
    """Load `folder` in another process and compare it with the checkpoint that it was made from.

    Args:
        like: given for a universal checkpoint, the folder with its model's configuration.

    Raises:
        CheckpointError: logits are not finite, or logits, losses of passes or the number of parameters differ, or
            decoding with the cache gives other tokens than decoding without it.
    """
    if like is None:
        source = find(source)
        configuration = configuration_from_dict(read_state(source, "model")["model"])
        read = read_weights(source, average=average)
    else:
        configuration, read = read_universal(source, like)
    model = model_class(configuration)(configuration).eval()
    weights = {name: weight.to(getattr(torch, dtype)).float() for name, weight in read}
    model.load_state_dict(weights, strict=not configuration.tie_word_embeddings)
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(32, configuration.max_position_embeddings - 16))
    tokens = torch.randint(0, configuration.vocab_size, shape, generator=generator)
    with torch.no_grad():
        pass_losses = model(tokens, labels=tokens).pass_losses
        logits = torch.stack([model(tokens, pondering_steps=steps).logits for steps in range(len(pass_losses))])
    if not logits.isfinite().all():
        raise CheckpointError(
            f"{folder}: some logits are not finite with the weights of {source} in {dtype}; if the run had finite "
            "losses, they overflow in this dtype, so export as bfloat16 or float32"
        )
    with tempfile.TemporaryDirectory() as temporary:
        expected = Path(temporary, "expected.safetensors")
        tensors = {"input_ids": tokens, "labels": tokens.clone(), "logits": logits, "pass_losses": pass_losses}
        save_file(tensors, expected)
        script = Path(__file__).with_name("check_folder.py")
        # With -I, the exported code cannot import anything from the current folder or PYTHONPATH.
        command = [sys.executable, "-I", str(script), str(folder.resolve()), str(expected)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise CheckpointError(f"{folder}: cannot be loaded in a fresh process: {said[-1]}")
    report = json.loads(done.stdout.splitlines()[-1])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    close = report["logits"] <= TOLERANCE and report["pass_losses"] <= TOLERANCE  # False for nan
    if not close or report["parameters"] != parameters:
        raise CheckpointError(f"{folder}: its outputs differ from those of checkpoint {source}: {report}")
    if not report["cached_equals_uncached"]:
        raise CheckpointError(f"{folder}: decoding with the cache gives other tokens than without")
    logger.info(
        "verified %s in a fresh process: logits within %.1e, cached decoding equals uncached",
        folder,
        report["logits"],
    )
