"""Attention, kernels and compilation of the transformer: what cannot work is refused, what works changes no numbers."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import pytest
import torch

from ponder_scale.config import ModelConfig, TrainConfig
from ponder_scale.errors import ConfigError
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.setup.recompute import apply_recompute
from ponder_scale.setup.speed import apply_speed, document_arguments

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA refuses")


def model(architecture: str = "llama", **fields: Any) -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = ModelConfig(architecture=architecture, pondering_steps=2, **shape, **fields)  # type: ignore[arg-type]
    return build_model(model_configuration(config, vocab_size=96, seq_len=24, eod_id=0), seed=0)


def train_config(**options: Any) -> TrainConfig:
    return TrainConfig(steps=1, global_batch=1, **options)


@without_cuda
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash_attention_2"}, "train.attention is flash_attention_2, which needs CUDA; use sdpa"),
        ({"kernels": "liger"}, "train.kernels is liger, whose kernels need CUDA; use torch"),
        ({"compile": True, "recompute": "selective"}, "train.recompute selective chooses among operations"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_speed(model(), train_config(**options))


@without_cuda
def test_compilation_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        apply_speed(model(), train_config(compile=True))


@without_cuda
def test_attention_is_that_of_torch_where_flash_attention_is_not() -> None:
    chosen = model()
    apply_speed(chosen, train_config())
    assert chosen.config._attn_implementation == "sdpa"


def test_flash_attention_is_told_where_documents_begin() -> None:
    chosen = model()
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    assert document_arguments(chosen, positions) == {}
    chosen.config._attn_implementation = "flash_attention_2"
    found = document_arguments(chosen, positions)
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 5, 10]
    assert found["max_length_q"] == found["max_length_k"] == 5


def gradients(chosen: Any, steps: int, **options: Any) -> dict[str, torch.Tensor]:
    tokens = torch.arange(2 * 24).view(2, 24) % 96
    chosen.zero_grad()
    options |= {"pondering_steps": steps, "skip_logits": True}
    chosen(input_ids=tokens, shift_labels=tokens.flip(1), **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in chosen.named_parameters()}


@pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("g++")), reason="no C++ compiler: nothing compiled")
@pytest.mark.parametrize("policy", ["none", "layer", "pass"])
@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients_from_one_graph(policy: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, plain = model(), model()
    apply_speed(compiled, train_config(compile=True, recompute=policy))
    apply_recompute(compiled, policy)
    for steps in (2, 1):
        for name, expected in gradients(plain, steps).items():
            torch.testing.assert_close(gradients(compiled, steps)[name], expected, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("g++")), reason="no C++ compiler: nothing compiled")
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"feedback": "latent"}, {}),
        ({"feedback": "pause"}, {}),
        ({"extra_heads": 2}, {"multi_token_weight": 0.3}),
    ],
    ids=["latent", "pause", "heads"],
)
@pytest.mark.slow
def test_compiled_latents_and_heads_have_the_same_gradients(fields: dict[str, Any], options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, plain = model(**fields), model(**fields)
    apply_speed(compiled, train_config(compile=True, recompute="layer"))
    apply_recompute(compiled, "layer")
    for name, expected in gradients(plain, 2, **options).items():
        torch.testing.assert_close(gradients(compiled, 2, **options)[name], expected, rtol=1e-4, atol=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_ligers_kernels_give_the_same_gradients(architecture: str) -> None:
    fused, plain = model(architecture).cuda(), model(architecture).cuda()
    apply_speed(fused, train_config(kernels="liger"))
    tokens = (torch.arange(2 * 24).view(2, 24) % 96).cuda()
    for chosen in (fused, plain):
        chosen(input_ids=tokens, shift_labels=tokens, skip_logits=True).loss.backward()
    for (name, got), expected in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_attention_stays_within_documents_as_the_mask_does() -> None:
    flash, masked = model().cuda().bfloat16(), model().cuda().bfloat16()
    apply_speed(flash, train_config(attention="flash_attention_2"))
    apply_speed(masked, train_config(attention="sdpa"))
    tokens = torch.arange(2 * 24).view(2, 24) % 96
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, 24)
    losses = []
    for chosen in (flash, masked):
        documents = {"position_ids": positions, **document_arguments(chosen, positions)}
        on_gpu = {key: value.cuda() if torch.is_tensor(value) else value for key, value in documents.items()}
        output = chosen(input_ids=tokens.cuda(), shift_labels=tokens.cuda(), skip_logits=True, **on_gpu)
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
