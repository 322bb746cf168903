"""Heads that predict tokens further ahead, against loops in fp64 over sequences, tokens and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from ponder_scale.model.multi_token import targets_ahead
from ponder_scale.setup.recompute import apply_recompute
from tests.model.architectures import TINY, VOCABULARY, make
from tests.model.equations import ahead_by_the_equations, by_the_equations

ARCHITECTURES = pytest.mark.parametrize("architecture", TINY)
HEADS, WEIGHT = 3, 0.7


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def with_heads(architecture: str = "llama", heads: int = HEADS, **fields: Any) -> Any:
    """A model in fp64 whose heads differ enough to see."""
    fields = {"pondering_steps": 2, "scale_embeds": True, **fields}
    model = make(architecture, extra_heads=heads, **fields).double()
    with torch.no_grad():
        for weight in (*model.extra_heads.parameters(), model.lm_head.weight):
            if weight.ndim > 1:
                weight.mul_(2.0)
    return model


def loss_by_loops(
    said: torch.Tensor, ahead: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the mean of each head, from logits (B, T, V) and (n, B, T, V). Labels (B, T) are not shifted."""
    total, number = said.new_zeros(()), 0
    sums, numbers = [said.new_zeros(()) for _ in ahead], [0] * len(ahead)
    rows, length = labels.shape
    for row in range(rows):
        for token in range(length - 1):
            if labels[row, token + 1] != -100:
                total = total - said[row, token].log_softmax(-1)[labels[row, token + 1]]
                number += 1
            for index in range(len(ahead)):
                path = range(token + 1, token + 3 + index)  # the tokens up to the predicted one
                if path[-1] >= length or any(labels[row, place] == -100 for place in path):
                    continue
                if documents is not None and documents[row, path[-1]] != documents[row, token]:
                    continue
                sums[index] = sums[index] - ahead[index, row, token].log_softmax(-1)[labels[row, path[-1]]]
                numbers[index] += 1
    means = torch.stack([part.detach() / count for part, count in zip(sums, numbers, strict=True)])
    return (total + WEIGHT * torch.stack(sums).sum()) / number, means


def check(model: Any, tokens: torch.Tensor, labels: torch.Tensor, documents: Any = None, **inputs: Any) -> None:
    """Loss, losses of the heads and all gradients are those of the loops."""
    output = model(tokens, labels=labels, multi_token_weight=WEIGHT, **inputs)
    output.loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    said, ahead = by_the_equations(model, tokens, **inputs), ahead_by_the_equations(model, tokens, **inputs)
    loss, means = loss_by_loops(said, ahead, labels, documents)
    torch.testing.assert_close(output.loss, loss, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(output.multi_token_losses, means, atol=1e-12, rtol=1e-10)
    loss.backward()
    for name, parameter in model.named_parameters():
        # norms and rotations are in fp32, and the equations go through them once for each head
        close = 1e-6 * parameter.grad.abs().max().item()
        torch.testing.assert_close(got[name], parameter.grad, atol=close, rtol=1e-6, msg=name)
    assert all(got[name].abs().max() > 0 for name in got if name.startswith("extra_heads") and name.endswith("weight"))


@ARCHITECTURES
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pondering_steps": 0, "tie_word_embeddings": True},
        {"feedback": "hidden", "residual": "restart", "num_hidden_layers": 1},
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_loops(
    architecture: str, fields: dict[str, Any], tokens: torch.Tensor
) -> None:
    if architecture == "gpt2" and "num_hidden_layers" in fields:
        fields = {**fields, "n_layer": fields["num_hidden_layers"]}
        del fields["num_hidden_layers"]
    labels = tokens.clone()
    labels[0, 3] = labels[1, 8:10] = -100
    check(with_heads(architecture, **fields).train(), tokens, labels)


@ARCHITECTURES
def test_no_head_predicts_a_token_of_another_document(architecture: str, tokens: torch.Tensor) -> None:
    """By positions that start again alone: as in a recipe's runs, the labels themselves go on."""
    documents = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [0] * 12])
    positions = torch.tensor([[*range(5), *range(3), *range(4)], [*range(12)]])
    check(with_heads(architecture).train(), tokens, tokens, documents, position_ids=positions)


def test_labels_count_up_to_the_first_token_that_does_not() -> None:
    targets = torch.tensor([[1, 2, 3, -100, 5, 6]])
    assert targets_ahead(targets, None, 2).tolist() == [
        [[2, 3, -100, -100, 6, -100]],
        [[3, -100, -100, -100, -100, -100]],
    ]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])  # token 6 may be of another document
    assert targets_ahead(targets.abs(), positions, 2).tolist() == [
        [[2, -100, -100, 5, -100, -100]],
        [[-100] * 6],
    ]
    assert targets_ahead(targets, None, 9).eq(-100)[5:].all(), "further ahead than the row is long"


@ARCHITECTURES
def test_the_model_itself_is_the_same_with_heads_and_without(architecture: str, tokens: torch.Tensor) -> None:
    model = with_heads(architecture).eval()
    plain = make(architecture, pondering_steps=2, scale_embeds=True).double().eval()
    assert not any("extra" in name for name in plain.state_dict())
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if "extra_heads" not in name})
    with torch.no_grad():
        expected = plain(tokens, labels=tokens)
        for options in ({}, {"multi_token_weight": WEIGHT}, {"extra_logits": True}):
            output = model(tokens, labels=tokens, **options)
            assert torch.equal(output.logits, expected.logits), options
            assert torch.equal(output.pass_losses, expected.pass_losses), options
        assert output.loss.item() == expected.loss.item()
        assert output.extra_logits.shape == (HEADS, 2, 12, VOCABULARY)
        torch.testing.assert_close(output.extra_logits, ahead_by_the_equations(model, tokens), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("policy", ["selective", "layer", "pass", "pass+layer"])
def test_recomputation_does_not_change_gradients(policy: str, tokens: torch.Tensor) -> None:
    gradients = []
    for each in ("none", policy):
        model = with_heads().train()
        apply_recompute(model, each)
        model(
            tokens, labels=tokens, multi_token_weight=WEIGHT, pass_weights=[0.2, 0.3, 0.5], z_loss=1e-3
        ).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-14, rtol=1e-12)


def test_gradient_checkpointing_of_transformers_does_not_change_them_either(tokens: torch.Tensor) -> None:
    gradients = []
    for enabled in (False, True):
        model = with_heads().train()
        if enabled:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens, multi_token_weight=WEIGHT).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-14, rtol=1e-12)


def test_with_four_heads_less_is_alive_than_half_of_one_tensor_of_logits() -> None:
    """Counted in bytes at the peak of forward and backward, weights and gradients included."""
    vocabulary, shape = 16384, (2, 512)
    model = make(vocab_size=vocabulary, extra_heads=4, pondering_steps=0, max_position_embeddings=512).train()
    apply_recompute(model, "pass")
    tokens, tracker = torch.zeros(shape, dtype=torch.int64), MemTracker()
    tracker.track_external(model)
    with tracker:
        model(tokens, labels=tokens, multi_token_weight=1.0).loss.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    alive = sum(size for kind, size in peak.items() if "Total" in str(kind))
    logits = 4 * shape[0] * shape[1] * vocabulary
    assert model.lm_head.weight.nbytes < alive < logits / 2, alive / logits


@ARCHITECTURES
def test_heads_survive_save_and_load_and_may_be_added_to_a_plain_folder(
    architecture: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = with_heads(architecture).float().eval()
    model.save_pretrained(tmp_path / "heads")
    again = type(model).from_pretrained(tmp_path / "heads").eval()
    assert again.config.extra_heads == HEADS
    outputs = [each(tokens, labels=tokens, multi_token_weight=WEIGHT).loss for each in (model, again)]
    assert torch.equal(*outputs)
    make(architecture, pondering_steps=2).save_pretrained(tmp_path / "plain")
    more = type(model).from_pretrained(tmp_path / "plain", extra_heads=2)
    assert len(more.extra_heads) == 2
    assert all(
        weight.isfinite().all() and weight.abs().max() > 0
        for weight in more.extra_heads.parameters()
        if weight.ndim > 1
    )


def test_the_loss_of_a_step_can_be_summed_over_micro_batches(tokens: torch.Tensor) -> None:
    """With one divisor, parts of a batch add up to the whole, so every label has one weight."""
    model = with_heads().eval()
    with torch.no_grad():
        whole = model(tokens, labels=tokens, multi_token_weight=WEIGHT).loss
        parts = [
            model(row, labels=row, multi_token_weight=WEIGHT, num_items_in_batch=22).loss for row in tokens.split(1)
        ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=1e-12)


def test_what_would_be_wrong_is_refused(tokens: torch.Tensor) -> None:
    plain, model = make(pondering_steps=1), with_heads()
    for options in ({"multi_token_weight": 1.0}, {"extra_logits": True}):
        with pytest.raises(
            ValueError, match=f"{next(iter(options))} needs a model with extra_heads; this one has none"
        ):
            plain(tokens, labels=tokens, **options)
        with pytest.raises(ValueError, match=f"{next(iter(options))} with exit_kl: the heads read the last pass"):
            model(tokens, labels=tokens, exit_kl=0.1, use_cache=True, **options)
    for weight in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"multi_token_weight is .*; expected a finite number above 0"):
            model(tokens, labels=tokens, multi_token_weight=weight)
    for kind in ("gate", "exit"):
        with pytest.raises(ValueError, match=f"extra_heads is 1 with halting '{kind}': the heads read the last pass"):
            make(extra_heads=1, halting=kind)
    for feedback in ("latent", "pause"):
        with pytest.raises(ValueError, match=f"extra_heads is 1 with feedback '{feedback}', which adds positions"):
            make(extra_heads=1, feedback=feedback)
    for number in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"extra_heads is {number}; expected an integer of at least 0"):
            make(extra_heads=number)
    plain.config.extra_heads = 1
    with pytest.raises(ValueError, match="extra_heads is 1, but this model was made with 0"):
        plain(tokens, labels=tokens, multi_token_weight=1.0)


def test_a_loss_beside_other_losses_is_their_sum(tokens: torch.Tensor) -> None:
    model = with_heads().eval()
    more = {"pass_weights": [0.2, 0.3, 0.5], "z_loss": 1e-2, "backward_passes": 3}
    with torch.no_grad():
        output = model(tokens, labels=tokens, multi_token_weight=WEIGHT, **more)
        alone = model(tokens, labels=tokens, **more).loss
        ahead = model(tokens, labels=tokens, multi_token_weight=WEIGHT).loss - model(tokens, labels=tokens).loss
    torch.testing.assert_close(output.loss, alone + ahead, atol=1e-12, rtol=1e-12)


def test_a_sequence_with_fewer_steps_trains_its_heads_on_its_own_last_pass(tokens: torch.Tensor) -> None:
    model = with_heads().eval()
    with torch.no_grad():
        together = model(tokens, sequence_steps=torch.tensor([1, 2]), extra_logits=True).extra_logits
        alone = [
            model(row, pondering_steps=steps, extra_logits=True).extra_logits
            for row, steps in zip(tokens.split(1), (1, 2), strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-12, rtol=1e-12)
    assert F.mse_loss(alone[0], model(tokens[:1], extra_logits=True).extra_logits).item() > 1e-6
