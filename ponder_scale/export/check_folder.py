"""Check an exported folder with torch and transformers only: `python check_folder.py FOLDER EXPECTED.safetensors`.

`verify.py` runs it in a process of its own. You can also run it anywhere that you copy the folder to. EXPECTED holds
`input_ids` (B, T), `labels`, the `logits` of each pass (S + 1, B, T, V) and `pass_losses` (S + 1,) of the checkpoint.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

NEW_TOKENS = 12


def main() -> None:
    """Print one JSON object with the largest differences, and with whether cached decoding equals uncached."""
    folder, expected_file = sys.argv[1:]
    expected = load_file(expected_file)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        pass_losses = model(expected["input_ids"], labels=expected["labels"]).pass_losses
        # pass s predicts what the model with s pondering steps predicts
        logits = [model(expected["input_ids"], pondering_steps=steps).logits for steps in range(len(pass_losses))]
    prompt = expected["input_ids"][:, :8]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options["attention_mask"] = torch.ones_like(prompt)
    decoded = [model.generate(prompt, use_cache=True, **options)]
    if getattr(model.config, "feedback", None) == "latent":  # so many make latents exact, as they are with a cache
        options["refinements"] = model.config.pondering_steps * (prompt.shape[1] + NEW_TOKENS)
    decoded.append(model.generate(prompt, use_cache=False, **options))
    report = {
        "logits": (torch.stack(logits) - expected["logits"]).abs().max().item(),
        "pass_losses": (pass_losses - expected["pass_losses"]).abs().max().item(),
        "cached_equals_uncached": torch.equal(*decoded),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
