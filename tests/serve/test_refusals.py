"""What is not served is refused in one sentence, before a token is made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ponder_scale.planning.serving import SERVED
from tests.serve.engine import ENVIRONMENT, REPOSITORY
from tests.serve.folders import make_folder, make_model

MISSING, EXTRA = "a missing part of a fused projection", "a tensor that is not the model's"
MISSING_OLMO2 = "a missing part of a projection that transformers' class has and vLLM fuses"
LOSSY = "a key-value cache in a narrower type"
# arguments of `LLM`, and what is said
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline parallelism": ({"pipeline_parallel_size": 2}, "pipeline parallelism, since a token"),
    "LoRA": ({"enable_lora": True}, "LoRA adapters; merge"),
    "quantization": ({"quantization": "fp8", "dtype": "bfloat16"}, "quantized weights"),
    "a quantized folder": (
        {
            "hf_overrides": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
            "dtype": "bfloat16",
        },
        "quantized weights",
    ),
    "a pooling runner": ({"runner": "pooling"}, "a pooling runner"),
    "a sliding window": ({"hf_overrides": {"sliding_window": 64}}, "a sliding window"),
    "a draft model": (
        {"speculative_config": {"method": "draft_model", "model": "FOLDER", "num_speculative_tokens": 2}},
        "the draft method 'draft_model'",
    ),
    "a field that is misspelt": (
        {"hf_overrides": {"pondering_step": 1}},
        "pondering_step, which is not one of their fields",
    ),
    "steps below 0": ({"hf_overrides": {"pondering_steps": -1}}, "pondering_steps is -1"),
    "an unknown residual": ({"hf_overrides": {"residual": "gated"}}, "residual is 'gated'"),
    "a learned gate": ({"hf_overrides": {"feedback": "both"}}, "the feedback 'both'"),
    "latents": ({"hf_overrides": {"feedback": "latent"}}, "the feedback 'latent'"),
    "pause tokens": ({"hf_overrides": {"feedback": "pause"}}, "the feedback 'pause'"),
    "learned halting": ({"hf_overrides": {"halting": "gate"}}, "halting, which changes what the model computes"),
    MISSING: ({}, r"no layers\.1\.self_attn\.k_proj\.weight"),
    MISSING_OLMO2: ({}, r"no layers\.0\.self_attn\.v_proj\.weight"),
    EXTRA: ({}, r"model\.gate\.weight is among the folder's weights"),
}


@pytest.fixture(scope="module")
def said(
    vllm: None, run: Callable[..., Any], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("refused")
    folders = {"": make_folder(base / "whole", make_model("llama", pondering_steps=2), tokenizer)}
    for name, architecture, change in (
        (MISSING, "llama", lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight")),
        (MISSING_OLMO2, "olmo2", lambda tensors: tensors.pop("model.layers.0.self_attn.v_proj.weight")),
        (EXTRA, "llama", lambda tensors: tensors.update({"model.gate.weight": tensors["model.norm.weight"].clone()})),
    ):
        folders[name] = make_folder(base / str(len(folders)), make_model(architecture, pondering_steps=1), tokenizer)
        tensors = load_file(folders[name] / "model.safetensors")
        change(tensors)
        save_file(tensors, folders[name] / "model.safetensors", metadata={"format": "pt"})
    jobs = {}
    for name, engine in {
        **{name: engine for name, (engine, _) in REFUSED.items()},
        LOSSY: {"kv_cache_dtype": "fp8"},
    }.items():
        folder = folders.get(name, folders[""])
        filled = json.loads(json.dumps(engine).replace("FOLDER", str(folder)))
        jobs[name] = {"folder": str(folder), "engine": filled, "prompts": [[1, 2, 3]]}
    return run(jobs, VLLM_CPU_OMP_THREADS_BIND="nobind")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name(name: str, said: dict[str, Any]) -> None:
    assert "error" in said[name], "it was served"
    # of ranks in processes of their own the sentence stands in the log, and vLLM's error says to look there
    where = said["log"] if "pipeline_parallel_size" in REFUSED[name][0] else said[name]["error"]
    assert re.search(REFUSED[name][1], where), where[-3000:]


def test_a_lossy_cache_is_warned_of(said: dict[str, Any]) -> None:
    assert "the key-value cache of fp8 is lossy: each pass reads it" in said["log"]
    # it is served then, but on CPUs without AVX-512, for which vLLM has no such cache
    error = said[LOSSY].get("error")
    assert error is None or "FP8 KV cache on CPU requires x86 with AVX-512 or AMX" in error


@pytest.fixture(scope="module")
def stand_ins(vllm: None) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.stand_ins"],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_attention_that_further_passes_would_not_have_is_refused(stand_ins: dict[str, Any]) -> None:
    assert stand_ins["plain"] == ""
    assert "attention sinks, which layers.0 has" in stand_ins["sinks"]
    assert "a sliding window" in stand_ins["window"]
    assert "ALiBi" in stand_ins["alibi"]
    assert "soft cap" in stand_ins["soft cap"]


def test_heads_and_tables_that_are_not_plain_rows_are_refused(stand_ins: dict[str, Any]) -> None:
    assert stand_ins["plain table"] == ""
    assert "a quantized embedding table" in stand_ins["quantized table"]
    assert "a bias" in stand_ins["bias"]
    assert "rows added" in stand_ins["added rows"]


def test_another_minor_version_is_warned_of_and_one_that_lacks_something_is_refused(stand_ins: dict[str, Any]) -> None:
    assert stand_ins["this version"] == []
    assert re.fullmatch(
        r"pondering models were tested with vLLM 0\.32, and this is 0\.33\.1; .*", stand_ins["next version"][0]
    )
    for name, what in (
        ("without rows", "its shard indices of the vocabulary have no num_org_elements"),
        ("without arguments", "its Attention takes no num_kv_heads; its Attention takes no cache_config"),
        ("without dimensions", "its support_torch_compile takes no dynamic_arg_dims"),
        ("without attention", "cannot import name 'Attention' from 'vllm.model_executor.layers.attention'"),
    ):
        said = stand_ins[name]
        assert said.startswith("vLLM 0.32") and f"cannot serve pondering models: {what}" in said, (name, said)
        assert "install vLLM 0.32" in said and "\n" not in said


def test_dual_batch_overlap_and_methods_that_the_plugin_does_not_know_are_refused(stand_ins: dict[str, Any]) -> None:
    assert stand_ins["plain engine"] == stand_ins["a method at its default"] == ""
    assert "with dual batch overlap, since" in stand_ins["dual batch"]
    assert "with pondering_gate, which changes what the model computes" in stand_ins["a method"]


def test_a_lossy_cache_and_the_runner_that_was_not_tested_are_warned_of(stand_ins: dict[str, Any]) -> None:
    assert stand_ins["quiet"] == stand_ins["same cache"] == []
    assert "the key-value cache of fp8_e4m3 is lossy" in stand_ins["fp8 cache"][0]
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in stand_ins["second runner"][0]


def test_what_plan_counts_for_a_server_is_what_is_served(stand_ins: dict[str, Any]) -> None:
    for feedback in ("embedding", "hidden", "both", "latent", "pause"):
        assert (stand_ins[feedback] == "") == (feedback in SERVED["feedback"]), stand_ins[feedback]
    assert "pondering models are not served with halting" in stand_ins["halting"]
    assert "the 2 extra heads of this model are left out" in stand_ins["extra heads"][0]


def test_the_plugin_may_be_called_again_and_imports_no_model(stand_ins: dict[str, Any]) -> None:
    assert stand_ins["registered"] == {"unknown": [], "models": False}


def test_without_the_plugin_a_folder_is_refused(run: Callable[..., Any], tokenizer: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", make_model("llama", pondering_steps=2), tokenizer)
    jobs = {"llama": {"folder": str(folder), "engine": {}, "prompts": [[1, 2, 3]]}}
    assert "error" in run(jobs, VLLM_PLUGINS="none")["llama"]
