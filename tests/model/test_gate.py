"""The feedback of hidden states and pondering embedding together, by a learned gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.architectures import TINY, VOCABULARY, make, make_confident
from tests.model.equations import by_the_equations

ARCHITECTURES = pytest.mark.parametrize("architecture", TINY)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def opened(model: Any) -> Any:
    """The model with a gate that has learned something."""
    with torch.no_grad():
        model.hidden_gate.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return model


@ARCHITECTURES
@pytest.mark.parametrize("residual", ["accumulate", "restart", "replace"])
def test_logits_and_gradients_are_those_of_the_equations(
    architecture: str, residual: str, tokens: torch.Tensor
) -> None:
    fields = {"residual": residual, "scale_embeds": True, "pondering_temperature": 0.8, "pondering_top_k": 9}
    model = opened(make(architecture, pondering_steps=2, feedback="both", **fields).double())
    output = model(tokens, labels=tokens, skip_logits=False)
    output.loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = by_the_equations(model, tokens)
    torch.testing.assert_close(output.logits, expected, atol=1e-10, rtol=1e-10)
    torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert got["hidden_gate.weight"].abs().min() > 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-12, rtol=1e-9, msg=name)


@ARCHITECTURES
def test_it_starts_as_the_plain_method_and_the_gate_learns_from_the_first_step(
    architecture: str, tokens: torch.Tensor
) -> None:
    both, plain = (make(architecture, pondering_steps=2, feedback=feedback) for feedback in ("both", "embedding"))
    assert both.state_dict().keys() - plain.state_dict().keys() == {"hidden_gate.weight"}
    both.load_state_dict(plain.state_dict(), strict=False)
    output = both(tokens, labels=tokens)
    assert output.loss.item() == plain(tokens, labels=tokens).loss.item()
    output.loss.backward()
    assert both.hidden_gate.weight.abs().max() == 0 and both.hidden_gate.weight.grad.abs().min() > 0


@ARCHITECTURES
def test_without_pondering_steps_there_is_no_gate_and_the_model_is_the_stock_one(
    architecture: str, tokens: torch.Tensor
) -> None:
    tiny = TINY[architecture]
    stock = tiny.stock_model(tiny.stock_configuration(**tiny.shape)).eval()
    ours = make(architecture, pondering_steps=0, feedback="both").eval()
    assert ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours(tokens).logits, stock(tokens).logits)
    with pytest.raises(
        ValueError, match="made without a gate; set feedback and pondering_steps when you create or load"
    ):
        ours(tokens, pondering_steps=1)
    open_gate = opened(make(architecture, pondering_steps=2, feedback="both")).eval()
    open_gate.base_model.load_state_dict(ours.base_model.state_dict())
    open_gate.lm_head.load_state_dict(ours.lm_head.state_dict())
    assert torch.equal(open_gate.draft(0)(tokens).logits, stock(tokens).logits)


@ARCHITECTURES
def test_cached_decoding_early_exit_and_drafts_give_what_they_do_without(
    architecture: str, tokens: torch.Tensor
) -> None:
    model = opened(make_confident(architecture, pondering_steps=2, feedback="both"))
    options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(tokens)}
    plain = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, **options), plain)
    assert torch.equal(model.generate(tokens, exit_kl=1e-12, **options), plain)
    one = {**options, "attention_mask": torch.ones_like(tokens[:1])}
    assert torch.equal(model.generate(tokens[:1], assistant_model=model.draft(0), **one), plain[:1])


@ARCHITECTURES
def test_the_gate_survives_save_and_load_and_a_folder_without_one_starts_closed(
    architecture: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = opened(make(architecture, pondering_steps=2, feedback="both")).eval()
    model.save_pretrained(tmp_path / "both")
    again = type(model).from_pretrained(tmp_path / "both").eval()
    assert torch.equal(again.hidden_gate.weight, model.hidden_gate.weight)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    plain = make(architecture, pondering_steps=2).eval()
    plain.save_pretrained(tmp_path / "plain")
    closed = type(model).from_pretrained(tmp_path / "plain", feedback="both").eval()
    assert torch.equal(closed.hidden_gate.weight, torch.zeros(model.config.hidden_size))
    assert torch.equal(closed(tokens).logits, plain(tokens).logits)


def test_a_step_without_pondering_gives_the_gate_a_gradient_of_zero(tokens: torch.Tensor) -> None:
    """ZeRO-3 would take the gradient of the step before for that of a weight that is not used."""
    model = opened(make(pondering_steps=2, feedback="both"))
    loss = model(tokens, labels=tokens, pondering_steps=0).loss
    loss.backward()
    assert torch.equal(model.hidden_gate.weight.grad, torch.zeros(model.config.hidden_size))
    with torch.no_grad():
        assert loss.item() == model(tokens, labels=tokens, pondering_steps=0).loss.item()


def test_a_feedback_that_is_set_later_has_no_gate_and_is_refused(tokens: torch.Tensor) -> None:
    model = make(pondering_steps=1)
    model.config.feedback = "both"
    with pytest.raises(ValueError, match="feedback is 'both', but this model was made without a gate"):
        model(tokens)
