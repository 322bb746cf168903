"""Whether an exported folder computes what its checkpoint does, seen from a fresh process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ponder_scale import checkpoint
from ponder_scale.build import configuration_from_dict, model_class
from ponder_scale.errors import CheckpointError
from ponder_scale.weights import read_weights

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of logits, between two processes in fp32; the weights are rounded to the export's dtype first


def verify_in_fresh_process(source: Path, folder: Path, *, dtype: str, average: bool = False) -> None:
    """Load `folder` elsewhere and compare it with the checkpoint it came from.

    Raises:
        CheckpointError: logits, per-pass losses or the number of parameters differ, or decoding with the cache
            gives other tokens than decoding without.
    """
    checkpoint_folder = checkpoint.find(source)
    configuration = configuration_from_dict(checkpoint.read_state(checkpoint_folder)["model"])
    model = model_class(configuration)(configuration).eval()
    read = read_weights(checkpoint_folder, average=average)
    weights = {name: weight.to(getattr(torch, dtype)).float() for name, weight in read}
    model.load_state_dict(weights, strict=not configuration.tie_word_embeddings)
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(32, configuration.max_position_embeddings - 16))
    tokens = torch.randint(0, configuration.vocab_size, shape, generator=generator)
    with torch.no_grad():
        pass_losses = model(tokens, labels=tokens).pass_losses
        logits = torch.stack([model(tokens, pondering_steps=steps).logits for steps in range(len(pass_losses))])
    with tempfile.TemporaryDirectory() as temporary:
        expected = Path(temporary, "expected.safetensors")
        tensors = {"input_ids": tokens, "labels": tokens.clone(), "logits": logits, "pass_losses": pass_losses}
        save_file(tensors, expected)
        script = Path(__file__).with_name("check_folder.py")
        # -I: nothing of the current folder or of PYTHONPATH can help the exported code
        command = [sys.executable, "-I", str(script), str(folder.resolve()), str(expected)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
    if done.returncode:
        raise CheckpointError(f"{folder}: cannot be loaded in a fresh process: {done.stderr.strip().splitlines()[-1]}")
    report = json.loads(done.stdout.splitlines()[-1])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    close = report["logits"] <= TOLERANCE and report["pass_losses"] <= TOLERANCE  # nan is not
    if not close or report["parameters"] != parameters:
        raise CheckpointError(f"{folder}: computes something else than checkpoint {checkpoint_folder}: {report}")
    if not report["cached_equals_uncached"]:
        raise CheckpointError(f"{folder}: decoding with the cache gives other tokens than without")
    logger.info(
        "verified %s in a fresh process: logits within %.1e, cached decoding equals uncached",
        folder,
        report["logits"],
    )
