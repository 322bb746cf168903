"""Folders as the published code saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.model.published import CASES, CONTENT, ORACLE

NAMES = (
    "llama.S3.scale1.mult1",
    "llama.vanilla",
    "gpt_neox.S1.scale1.mult0",
    "gpt2.S1.scale1.mult0",
    "orin.S2.scale1.resid0",
    "orin.S2.scale1.resid1",
)


def published_folder(folder: Path, name: str, *, pytorch: bool = False, **keys: Any) -> Path:
    """A folder as the published code saves it."""
    case = CASES[name]
    family = CONTENT["families"][case["family"]]
    folder.mkdir()
    config = {key: value for key, value in family["config"].items() if key != "num_parameters"}
    config |= {**case["settings"], "torch_dtype": "float32", "architectures": ["AnyForCausalLM"], **keys}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(ORACLE / family["weights"])
    if pytorch:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
