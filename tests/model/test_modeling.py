"""The pondering model against the stock one, its configuration, its initial weights, its outputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ponder_scale.model.configuration import PonderGPTNeoXConfig, PonderLlamaConfig
from tests.model.architectures import TINY, VOCABULARY, make
from tests.model.equations import by_the_equations

ARCHITECTURES = pytest.mark.parametrize("architecture", TINY)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))


@ARCHITECTURES
def test_zero_pondering_steps_is_the_stock_model_bit_for_bit(architecture: str, tokens: torch.Tensor) -> None:
    tiny = TINY[architecture]
    stock = tiny.stock_model(tiny.stock_configuration(**tiny.shape)).eval()
    ours = make(architecture, pondering_steps=0).eval()
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours(tokens).logits, stock(tokens).logits)
    assert ours(tokens, labels=tokens).loss.item() == pytest.approx(stock(tokens, labels=tokens).loss.item(), abs=1e-6)


@ARCHITECTURES
@pytest.mark.parametrize("residual", ["accumulate", "restart"])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_equations(
    architecture: str, tokens: torch.Tensor, residual: str, top_k: int | None, tied: bool
) -> None:
    fields = {"residual": residual, "pondering_top_k": top_k, "tie_word_embeddings": tied}
    model = make(
        architecture, pondering_steps=3, scale_embeds=True, initial_scale=3.0, pondering_temperature=0.8, **fields
    )
    model = model.double().eval()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, by_the_equations(model, tokens), atol=1e-10, rtol=1e-10)


@ARCHITECTURES
@pytest.mark.parametrize("residual", ["accumulate", "restart", "replace"])
@pytest.mark.parametrize("feedback", ["embedding", "hidden"])
def test_other_feedbacks_and_a_looped_transformer_are_those_of_the_equations(
    architecture: str, tokens: torch.Tensor, residual: str, feedback: str
) -> None:
    fields = {"residual": residual, "feedback": feedback, "initial_scale": 2.0}
    model = make(architecture, pondering_steps=2, scale_embeds=True, **fields).double().eval()
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(output.logits, by_the_equations(model, tokens), atol=1e-10, rtol=1e-10)
    shorter = model(tokens, labels=tokens, pondering_steps=1)
    assert output.pass_losses[1].item() == pytest.approx(shorter.loss.item(), rel=1e-6)
    output.loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = by_the_equations(model, tokens)[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-12, rtol=1e-9)


@ARCHITECTURES
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize(
    # not eager in fp64: transformers' own fp32 softmax turns its fp64 mask into NaN where a whole row is padding
    ("implementation", "dtype", "tolerance"),
    [("sdpa", torch.float64, 1e-10), ("eager", torch.float32, 1e-4)],
)
def test_masks_and_positions_reach_every_pass_as_they_were_given(
    architecture: str,
    tokens: torch.Tensor,
    with_positions: bool,
    implementation: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    model = make(architecture, pondering_steps=2, scale_embeds=True, attn_implementation=implementation)
    model = model.to(dtype).eval()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0  # left padding
    inputs = {"attention_mask": mask}
    if with_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        got, expected = model(tokens, **inputs).logits, by_the_equations(model, tokens, **inputs)
        alone = model(tokens[1:, 5:]).logits
    counted = mask.bool()
    torch.testing.assert_close(got[counted], expected[counted], atol=tolerance, rtol=tolerance)
    if with_positions:
        torch.testing.assert_close(got[1, 5:], alone[0], atol=tolerance, rtol=tolerance)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_row_is_trained_by_the_mixture_and_not_by_look_ups(
    architecture: str, tokens: torch.Tensor, tied: bool
) -> None:
    model = make(architecture, pondering_steps=1, scale_embeds=True, pad_token_id=7, tie_word_embeddings=tied).double()
    table = model.get_input_embeddings()
    assert table.padding_idx == 7 and not table.weight[7].any()
    labels = tokens.clone()
    tokens[:, :4] = 7
    model(tokens, labels=labels).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = by_the_equations(model, tokens)[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-12, rtol=1e-9)
    assert table.weight.grad[7].any()


def test_pass_losses_and_entropies_are_those_of_fewer_steps(tokens: torch.Tensor) -> None:
    model = make(pondering_steps=3, scale_embeds=True).eval()
    labels = tokens.clone()
    labels[0, :5] = -100
    output = model(tokens, labels=labels)
    for steps in range(4):
        shorter = model(tokens, labels=labels, pondering_steps=steps)
        assert output.pass_losses[steps].item() == pytest.approx(shorter.loss.item(), rel=1e-5)
        distribution = torch.distributions.Categorical(logits=shorter.logits[:, :-1])
        entropy = distribution.entropy()[labels[:, 1:] != -100].mean().item()
        assert output.pass_entropies[steps].item() == pytest.approx(entropy, rel=1e-4)
    assert output.loss.item() == pytest.approx(output.pass_losses[-1].item(), rel=1e-6)


def test_shifted_labels_and_items_in_batch_mean_what_they_do_in_transformers(tokens: torch.Tensor) -> None:
    model = make(pondering_steps=1).eval()
    loss = model(tokens, labels=tokens).loss
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(tokens, shift_labels=shifted).loss, loss)
    torch.testing.assert_close(model(tokens, labels=tokens, num_items_in_batch=60).loss, loss * 30 / 60)


def test_training_builds_no_logits_and_evaluation_does(tokens: torch.Tensor) -> None:
    model = make(pondering_steps=1)
    assert model.train()(tokens, labels=tokens).logits is None
    assert model.train()(tokens).logits.shape == (2, 16, VOCABULARY)
    assert model.eval()(tokens, labels=tokens).logits is not None
    assert model.eval()(tokens, labels=tokens, skip_logits=True).logits is None


@ARCHITECTURES
def test_initial_weights_are_distributed_as_published(architecture: str) -> None:
    wide = {"n_embd": 128, "n_inner": 256} if architecture == "gpt2" else {"hidden_size": 128, "intermediate_size": 256}
    for by_passes in (None, False, True):
        model = make(architecture, pondering_steps=3, init_by_passes=by_passes, **wide)
        base = math.sqrt(2 / (5 * 128))
        divides = architecture == "gpt_neox" if by_passes is None else by_passes
        inner = base / math.sqrt(2 * 2 * (4 if divides else 1))
        truncation = 0.98658  # of the standard deviation, by cutting a normal distribution at 3 sigma
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                assert torch.equal(weight, torch.full_like(weight, float(name.endswith("weight")))), name
                continue
            std = inner if name.endswith(TINY[architecture].projections) else base
            assert weight.std().item() == pytest.approx(std * truncation, rel=0.03), name
            assert weight.abs().max() <= 3 * std


@ARCHITECTURES
def test_weights_and_configuration_survive_save_and_load(
    architecture: str, tmp_path: Path, tokens: torch.Tensor
) -> None:
    fields: dict[str, Any] = {"pondering_steps": 2, "residual": "restart", "initial_scale": 2.0, "pondering_top_k": 7}
    if architecture == "olmo2":
        fields |= {"residual": "replace", "feedback": "hidden", "pondering_top_k": None}
    rotary = {} if architecture == "gpt2" else {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    model = make(architecture, **fields, **rotary).eval()
    model.save_pretrained(tmp_path)
    loaded = TINY[architecture].model.from_pretrained(tmp_path).eval()
    assert {key: getattr(loaded.config, key) for key in fields} == fields
    assert not rotary or loaded.config.rope_parameters["rope_theta"] == 5e5
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pondering_steps", -1),
        ("pondering_steps", 1.5),
        ("pondering_temperature", 0.0),
        ("initial_scale", 0.0),
        ("residual", "add"),
        ("feedback", "logits"),
        ("pondering_top_k", 0),
    ],
)
def test_a_field_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r}; expected"):
        PonderLlamaConfig(**{field: value})


def test_settings_of_a_softmax_that_is_not_there_are_refused() -> None:
    for field, value in (("pondering_top_k", 5), ("pondering_temperature", 0.5)):
        with pytest.raises(ValueError, match="which feedback 'hidden' does not use"):
            PonderLlamaConfig(feedback="hidden", **{field: value})


def test_a_large_epsilon_reaches_every_norm(tokens: torch.Tensor) -> None:
    """The follow-up trains with 0.1, at which a norm with an epsilon of its own would show."""
    for architecture, name in (
        ("llama", "rms_norm_eps"),
        ("gpt_neox", "layer_norm_eps"),
        ("gpt2", "layer_norm_epsilon"),
    ):
        model, usual = (make(architecture, pondering_steps=2, scale_embeds=True, **{name: eps}) for eps in (0.1, 1e-5))
        assert model.load_state_dict(usual.state_dict())
        epsilons = [
            getattr(module, key)
            for module in model.modules()
            for key in ("eps", "variance_epsilon")
            if "Norm" in type(module).__name__ and hasattr(module, key)
        ]
        assert epsilons == [0.1] * (2 * model.num_layers + 1)
        with torch.no_grad():
            got, other = model.double().eval()(tokens).logits, usual.double().eval()(tokens).logits
            torch.testing.assert_close(got, by_the_equations(model, tokens), atol=1e-10, rtol=1e-10)
        assert (got - other).abs().max() > 1e-3


def test_older_readers_find_the_rotary_base_and_the_dtype() -> None:
    rotary = {"rope_type": "default", "rope_theta": 5e5}
    values = PonderLlamaConfig(rope_parameters=dict(rotary), dtype="bfloat16").to_diff_dict()
    assert values["rope_theta"] == 5e5 and values["torch_dtype"] == values["dtype"] == "bfloat16"
    values = PonderGPTNeoXConfig(rope_parameters=rotary | {"partial_rotary_factor": 0.5}).to_dict()
    assert (values["rotary_emb_base"], values["rotary_pct"]) == (5e5, 0.5)
    assert PonderGPTNeoXConfig.from_dict(values).rope_parameters["partial_rotary_factor"] == 0.5
