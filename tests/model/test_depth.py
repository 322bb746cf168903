"""Sequences of one batch that take different numbers of pondering steps: each is as if it were alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tests.model.architectures import TINY, VOCABULARY, make, make_confident
from tests.model.equations import by_the_equations

STEPS = (2, 0, 3, 1)
RESIDUALS, FEEDBACKS = ("accumulate", "restart", "replace"), ("embedding", "hidden")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (len(STEPS), 12), generator=torch.Generator().manual_seed(0))


def alone(model: Any, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """The logits (1, T, V) of one sequence (T,) by the equations."""
    trained, model.config.pondering_steps = model.config.pondering_steps, steps
    logits = by_the_equations(model, tokens[None])
    model.config.pondering_steps = trained
    return logits


@pytest.mark.parametrize(("residual", "feedback"), itertools.product(RESIDUALS, FEEDBACKS))
def test_logits_losses_and_gradients_are_those_of_each_sequence_alone(
    residual: str, feedback: str, tokens: torch.Tensor
) -> None:
    for architecture in TINY:
        fields = {"residual": residual, "feedback": feedback, "scale_embeds": True}
        model = make(architecture, pondering_steps=3, **fields).double()
        output = model(tokens, labels=tokens, sequence_steps=torch.tensor(STEPS), skip_logits=False)
        output.loss.backward()
        got = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        expected = [alone(model, row, steps) for row, steps in zip(tokens, STEPS, strict=True)]
        torch.testing.assert_close(output.logits, torch.cat(expected), atol=1e-10, rtol=1e-10)
        rows = zip(expected, tokens, strict=True)
        loss = sum(torch.nn.functional.cross_entropy(logits[0, :-1], row[1:]) for logits, row in rows) / len(STEPS)
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-12, rtol=1e-9, msg=name)


def test_the_loss_of_a_pass_after_a_sequence_s_last_is_that_of_its_last(tokens: torch.Tensor) -> None:
    model = make(pondering_steps=3).double()
    losses = model(tokens, labels=tokens, sequence_steps=torch.tensor(STEPS)).pass_losses
    rows = [model(row[None], labels=row[None]).pass_losses for row in tokens]
    for index in range(4):
        mean = sum(row[min(index, steps)] for row, steps in zip(rows, STEPS, strict=True)) / len(STEPS)
        assert losses[index].item() == pytest.approx(mean.item(), rel=1e-12)


def through_the_last(model: Any, tokens: torch.Tensor, passes: int) -> torch.Tensor:
    """The logits by the equations, with what is fed back before the last `passes` passes detached."""
    config, one_pass = model.config, model.base_model.one_pass
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    scale = math.sqrt(table.shape[1])
    e = first = scale * table[tokens]
    for index in range(config.pondering_steps):
        hidden = one_pass(e).last_hidden_state
        fed_back = hidden if config.feedback == "hidden" else scale * torch.softmax(hidden @ head.t(), -1) @ table
        if index < config.pondering_steps + 1 - passes:
            fed_back = fed_back.detach()
        e = {"accumulate": e, "restart": first, "replace": 0.0 * first}[config.residual] + fed_back
    return one_pass(e).last_hidden_state @ head.t()


@pytest.mark.parametrize(("residual", "feedback"), itertools.product(RESIDUALS, FEEDBACKS))
def test_gradients_through_the_last_passes_are_those_of_autograd_with_a_detach(
    residual: str, feedback: str, tokens: torch.Tensor
) -> None:
    for architecture, passes in itertools.product(TINY, (1, 2, 4)):
        fields = {"residual": residual, "feedback": feedback, "scale_embeds": True}
        model = make(architecture, pondering_steps=3, **fields).double()
        whole = model(tokens, labels=tokens).loss
        loss = model(tokens, labels=tokens, backward_passes=passes).loss
        assert loss.item() == whole.item()  # a forward is the same
        loss.backward()
        got = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        logits = through_the_last(model, tokens, passes)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found = torch.zeros_like(parameter) if got[name] is None else got[name]
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9, msg=f"{architecture} {passes} {name}")


def test_more_passes_to_differentiate_than_there_are_means_all(tokens: torch.Tensor) -> None:
    model = make(pondering_steps=2)
    gradients = []
    for passes in (None, 3, 9):
        model.zero_grad()
        model(tokens, labels=tokens, backward_passes=passes).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("passes", [0, -1, 1.0, True])
def test_a_number_of_differentiated_passes_that_cannot_be_is_refused(passes: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"backward_passes is .*; expected an integer of at least 1, or None"):
        make()(tokens, backward_passes=passes)


def test_differentiated_passes_are_not_counted_from_a_sequence_s_own_last(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no gradient through its own last passes"):
        make()(tokens, backward_passes=1, sequence_steps=torch.tensor(STEPS))


def test_more_passes_than_any_sequence_takes_change_nothing(tokens: torch.Tensor) -> None:
    model, steps = make(pondering_steps=3).eval(), torch.tensor((1, 0, 2, 1))
    few, many = (model(tokens, sequence_steps=steps, pondering_steps=most).logits for most in (2, 5))
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)


def test_a_cache_gives_what_decoding_without_one_does(tokens: torch.Tensor) -> None:
    model, steps = make_confident("llama", pondering_steps=3).double(), torch.tensor(STEPS)
    with torch.no_grad():
        whole = model(tokens, sequence_steps=steps).logits
        output = model(tokens[:, :8], sequence_steps=steps, use_cache=True)
        parts = [output.logits]
        for place in range(8, tokens.shape[1]):
            token = tokens[:, place : place + 1]
            cache = output.past_key_values
            output = model(token, sequence_steps=steps, use_cache=True, past_key_values=cache)
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "steps", [torch.tensor([1.0, 0, 2, 1]), torch.tensor([1, 2]), torch.ones(4, 1).long(), [1] * 4]
)
def test_anything_but_an_integer_for_each_sequence_is_refused(steps: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"sequence_steps is .* expected one integer for each of the 4 sequences"):
        make()(tokens, sequence_steps=steps)
