"""Sequences of one batch that take different numbers of pondering steps: each is as if it were alone."""

from __future__ import annotations

import itertools
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
