"""Gradients under ZeRO-3 with two ranks equal plain torch for every architecture, with tied embeddings and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from ponder_scale.setup.build import ARCHITECTURES
from tests.model.architectures import TINY
from tests.train.zero.gradients import check, small_buckets


@pytest.mark.parametrize("policy", ["none", "layer", "pass", "pass+layer"])
def test_gradients_equal_plain_torch(policy: str, tmp_path: Path) -> None:
    deepspeed = small_buckets(tmp_path, 3)
    cases = []
    for architecture in sorted(TINY.keys() - {"llama"}):  # which test_gradients.py is about
        overrides = [f"model.architecture={architecture}", "model.initial_scale=3"]
        if "num_key_value_heads" in ARCHITECTURES[architecture].names:  # it has none
            overrides.append("model.num_key_value_heads=null")
        for tied in (False, True) if policy in ("none", "pass") else (True,):
            cases.append({"deepspeed": deepspeed, "policy": policy, "tied": tied, "overrides": overrides})
    check(cases)
