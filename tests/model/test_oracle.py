"""The published code's logits, losses, gradients and greedy continuation, case by case."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ponder_scale.model.configuration import INTERLEAVED
from tests.model.architectures import TINY
from tests.model.published import CASES, CONTENT, ORACLE

NOT_OURS = ("model_type", "num_parameters", "rope_scaling")


def pondering(family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Our names for the published code's settings."""
    feedback = family.partition("_")[0]
    if feedback in INTERLEAVED:
        scale = math.sqrt(2.5) if feedback == "latent" else 1.0
        fields = {"pondering_steps": settings["num_latent_thoughts"], "scale_embeds": settings["scale_embeds"]}
        return {**fields, "feedback": feedback, "initial_scale": scale}
    steps = settings.get("pondering_steps", settings.get("num_latent_thoughts", 0))
    accumulates = settings.get("residual_interpolated_embeds", True)
    return {
        "pondering_steps": steps,
        "scale_embeds": settings.get("scale_embeds", False),
        "initial_scale": float(steps) if settings.get("mutiply_pondering_steps") else 1.0,
        "pondering_temperature": settings.get("softmax_temperature", 1.0),
        "residual": "accumulate" if accumulates else "restart",
    }


def oracle_model(family: str, settings: dict[str, Any]) -> Any:
    description = CONTENT["families"][family]
    values = {key: value for key, value in description["config"].items() if key not in NOT_OURS}
    tiny = TINY[description["config"]["model_type"]]
    model = tiny.model(tiny.configuration(**values, **pondering(family, settings), attn_implementation="eager"))
    weights = load_file(ORACLE / description["weights"])
    weights.pop("adapter.weight", None)  # of the published GPT-NeoX, which never uses it
    if "embed_out.weight" in weights:
        weights["lm_head.weight"] = weights.pop("embed_out.weight")
    if "pause_token_id" in settings:  # a row of the published table
        weights["pause_embedding.weight"] = weights["model.embed_tokens.weight"][settings["pause_token_id"]][None]
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_those_of_the_published_code(name: str) -> None:
    case, inputs = CASES[name], load_file(ORACLE / "inputs.safetensors")
    tensors, samples = load_file(ORACLE / case["file"]), load_file(ORACLE / "grad_index.safetensors")
    model = oracle_model(case["family"], case["settings"])
    asked = {"refinements": case["settings"]["num_jacobi_iterations"]} if "latent" in name else {}
    output = model(inputs[case["input"]], labels=inputs[case["labels"]], **asked)
    output.loss.backward()
    if "pause" in name:
        model.model.embed_tokens.weight.grad[case["settings"]["pause_token_id"]] += model.pause_embedding.weight.grad[0]
        del model.pause_embedding
    # logits are as large as 10, and the dumped ones themselves are up to 1.3e-5 from those of float64; where in between
    # ours are depends on the width of the CPU's vectors
    torch.testing.assert_close(output.logits, tensors[f"{name}/logits"], atol=2e-5, rtol=0)
    assert output.loss.item() == pytest.approx(case["loss"], abs=1e-6, rel=2e-7)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name not in case["grad_l2"]:  # the published name of the head of GPT-NeoX
            parameter_name = parameter_name.replace("lm_head", "embed_out")
        expected = tensors.get(f"{name}/grad.{parameter_name}")
        gradient = parameter.grad
        if expected is None:
            expected = tensors[f"{name}/gradsample.{parameter_name}"]
            gradient = parameter.grad.flatten()[samples[str(parameter.numel())]]
        error = (gradient - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, parameter_name
        assert parameter.grad.norm().item() == pytest.approx(case["grad_l2"][parameter_name], rel=1e-4)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "pass0.logits" in case["tensors"]])
def test_the_inputs_of_every_pass_are_those_of_the_published_code(name: str) -> None:
    case, tensors = CASES[name], load_file(ORACLE / CASES[name]["file"])
    model = oracle_model(case["family"], case["settings"])
    seen: list[torch.Tensor] = []
    run_pass = model.run_pass

    def record(embeds: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(embeds)
        return run_pass(embeds, *arguments, **options)

    model.run_pass = record
    with torch.no_grad():
        model(load_file(ORACLE / "inputs.safetensors")[case["input"]])
    assert len(seen) == case["forwards"]
    for index, embeds in enumerate(seen):
        torch.testing.assert_close(embeds, tensors[f"{name}/pass{index}.inputs_embeds"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuation_is_that_of_the_published_code(use_cache: bool) -> None:
    generation = CONTENT["generation"][0]
    expected = load_file(ORACLE / "generation.safetensors")[generation["case"]]
    model = oracle_model(generation["family"], generation["settings"])
    prompt = load_file(ORACLE / "inputs.safetensors")["input_ids"]
    got = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=generation["new_tokens"],
        min_new_tokens=generation["new_tokens"],
        use_cache=use_cache,
        eos_token_id=None,
    )
    assert torch.equal(got, expected)
