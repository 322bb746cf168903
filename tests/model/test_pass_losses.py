"""The loss of a model whose passes learn, sum_s w_s CE_s, against the equations in float64 plain torch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ponder_scale.model.pondering_embedding import pondering_embedding
from ponder_scale.model.readout import Ops
from tests.model.adapters import LowRank, adapt
from tests.model.architectures import TINY, VOCABULARY, make, make_confident
from tests.model.equations import by_the_equations

STEPS = 3
WEIGHTS = (0.1, 0.0, 0.4, 0.5)
TOKENS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
LABELS[:, ::3] = -100
VARIANTS: list[dict[str, Any]] = [
    {},
    {"scale_embeds": True, "tie_word_embeddings": True},
    {"pondering_temperature": 0.8, "residual": "restart"},
    {"pondering_temperature": 1.3, "residual": "replace", "tie_word_embeddings": True},
    {"pondering_top_k": 7},
    {"pondering_top_k": 7, "pondering_temperature": 0.8, "tie_word_embeddings": True},
    {"feedback": "hidden", "residual": "replace"},
    {"feedback": "hidden", "tie_word_embeddings": True},
]


def losses_by_the_equations(model: Any, labels: torch.Tensor) -> list[torch.Tensor]:
    """The summed cross-entropy of each pass: of the model that ponders so many steps."""
    most, found = model.config.pondering_steps, []
    for steps in range(most + 1):
        model.config.pondering_steps = steps
        logits = by_the_equations(model, TOKENS)
        counted = labels != -100
        chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        found.append(((logits.logsumexp(-1) - chosen) * counted).sum())
    model.config.pondering_steps = most
    return found


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def confident(architecture: str = "gpt_neox", **fields: Any) -> Any:
    return make_confident(architecture, **{"pondering_steps": STEPS, "num_hidden_layers": 1, **fields}).double()


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_loss_and_gradients_are_those_of_the_weighted_equations(architecture: str, variant: dict[str, Any]) -> None:
    model = confident(architecture, **variant)
    output = model(TOKENS, shift_labels=LABELS, pass_weights=WEIGHTS)
    got = gradients(model, output.loss)
    counted = (LABELS != -100).sum()
    losses = [loss / counted for loss in losses_by_the_equations(model, LABELS)]
    expected = sum(weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True))
    torch.testing.assert_close(output.loss, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(output.pass_losses, torch.stack(losses), atol=1e-12, rtol=1e-10)
    assert not output.pass_losses.requires_grad
    # transformers' RMS norms compute in fp32 whatever they get
    bounds = {"atol": 1e-6, "rtol": 1e-5} if architecture in ("llama", "olmo2") else {"atol": 1e-12, "rtol": 1e-8}
    for ours, wanted in zip(got, gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, wanted, **bounds)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ops_that_keep_everything_give_the_same(variant: dict[str, Any]) -> None:
    if "feedback" in variant:
        pytest.skip("it has no pondering embedding")
    model, found = confident(**variant), []
    for ops in (None, Ops(partial(pondering_embedding, backend="eager"))):
        found.append(gradients(model, model(TOKENS, shift_labels=LABELS, pass_weights=WEIGHTS, ops=ops).loss))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_last_pass_alone_is_bit_for_bit_the_loss_without_weights(variant: dict[str, Any]) -> None:
    model = confident(**variant).float()
    found = []
    for weights in (None, (0.0, 0.0, 0.0, 1.0), [0, 0, 0, 1]):
        output = model(TOKENS, shift_labels=LABELS, z_loss=0.1, pass_weights=weights)
        grown = gradients(model, output.loss)
        found.append([output.loss, output.pass_losses, output.pass_entropies, output.z_loss, *grown])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def operations(loss: torch.Tensor) -> list[str]:
    """The names of the nodes of its graph, in the order of a walk."""
    names, seen, ahead = [], set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        ahead += [following for following, _ in node.next_functions]
    return names


def test_without_weights_no_loss_of_an_earlier_pass_is_in_the_graph() -> None:
    model = confident()
    plain = operations(model(TOKENS, shift_labels=LABELS).loss)
    learning = operations(model(TOKENS, shift_labels=LABELS, pass_weights=WEIGHTS).loss)
    assert len(plain) < len(learning) and plain.count("SumBackward0") == 0 < learning.count("SumBackward0")


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_z_loss_is_of_the_last_pass_and_has_no_weight(z_loss: float) -> None:
    model = confident(tie_word_embeddings=False)
    output = model(TOKENS, shift_labels=LABELS, pass_weights=WEIGHTS, z_loss=z_loss, num_items_in_batch=7)
    got = gradients(model, output.loss)
    counted = LABELS != -100
    squares = by_the_equations(model, TOKENS).logsumexp(-1)[counted].square().sum()
    losses = losses_by_the_equations(model, LABELS)
    expected = (sum(w * loss for w, loss in zip(WEIGHTS, losses, strict=True)) + z_loss * squares) / 7
    torch.testing.assert_close(output.loss, expected, atol=1e-12, rtol=1e-10)
    if z_loss:
        torch.testing.assert_close(output.z_loss, z_loss * squares / counted.sum(), atol=1e-12, rtol=1e-10)
    for ours, wanted in zip(got, gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("which", ["head", "table", "both"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_adapters_on_head_and_table_learn_of_every_pass(which: str, variant: dict[str, Any]) -> None:
    """Against autograd through a model without adapters, whose weights are computed from theirs."""
    model = confident(**{**variant, "tie_word_embeddings": False})
    adapters = adapt(model, which)
    output = model(TOKENS, shift_labels=LABELS, pass_weights=WEIGHTS)
    got = gradients(model, output.loss)
    plain = confident(**{**variant, "tie_word_embeddings": False})
    weights = {"lm_head.weight": model.lm_head, "gpt_neox.embed_in.weight": model.gpt_neox.embed_in}
    merged = {name: part.merged() for name, part in weights.items() if isinstance(part, LowRank)}
    assert len(merged) == len(adapters)
    total = torch.func.functional_call(_Losses(plain), {f"model.{name}": weight for name, weight in merged.items()}, ())
    torch.testing.assert_close(output.loss, total, atol=1e-10, rtol=1e-8)
    model.zero_grad()
    plain.zero_grad()
    total.backward()
    own = dict(plain.named_parameters())
    for (name, parameter), ours in zip(
        ((name, p) for name, p in model.named_parameters() if p.requires_grad), got, strict=True
    ):
        wanted = parameter.grad if name.endswith((".up", ".down")) else own[name].grad
        torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=1e-7)


class _Losses(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> torch.Tensor:
        losses = losses_by_the_equations(self.model, LABELS)
        return sum(w * loss for w, loss in zip(WEIGHTS, losses, strict=True)) / (LABELS != -100).sum()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bf16_is_as_close_as_that_of_the_last_pass_alone(variant: dict[str, Any]) -> None:
    errors = []
    for weights in (None, WEIGHTS):
        model = confident(**variant).bfloat16()
        got = gradients(model, model(TOKENS, shift_labels=LABELS, pass_weights=weights).loss)
        wide = model.double()
        losses = losses_by_the_equations(wide, LABELS)
        chosen = weights or (0.0,) * STEPS + (1.0,)
        expected = sum(w * loss for w, loss in zip(chosen, losses, strict=True)) / (LABELS != -100).sum()
        pairs = zip(got, gradients(wide, expected), strict=True)
        errors.append(max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs))
    assert errors[1] < max(4e-2, 1.5 * errors[0]), errors


def test_the_loss_without_gradient_is_the_same() -> None:
    for variant in VARIANTS:
        model = confident(**variant)
        wanted = model(TOKENS, shift_labels=LABELS, pass_weights=WEIGHTS)
        with torch.no_grad():
            got = model(TOKENS, shift_labels=LABELS, pass_weights=WEIGHTS)
        torch.testing.assert_close(got.loss, wanted.loss.detach(), atol=1e-12, rtol=1e-12)
        assert not got.loss.requires_grad


def test_without_labels_weights_change_nothing_and_no_label_that_counts_is_a_loss_of_0() -> None:
    model = confident()
    assert torch.equal(model(TOKENS, pass_weights=WEIGHTS).logits, model(TOKENS).logits)
    none = model(TOKENS, shift_labels=torch.full_like(LABELS, -100), pass_weights=WEIGHTS)
    assert none.loss == 0 and all(not gradient.any() for gradient in gradients(model, none.loss))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.5), "pass_weights has 2 weights; expected one for each of 4 passes"),
        ((0.5, 0.5, 0.0, 0.0), "expected at least 0 for each pass and more for the last"),
        ((0.5, -0.5, 0.5, 0.5), "expected at least 0 for each pass"),
        ((math.nan, 0.5, 0.5, 0.5), "expected at least 0 for each pass"),
    ],
)
def test_weights_that_fit_no_pass_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("llama", pondering_steps=STEPS)(TOKENS, shift_labels=LABELS, pass_weights=weights)


def test_losses_of_passes_without_gradient_are_refused() -> None:
    model = make("llama", pondering_steps=STEPS)
    with pytest.raises(ValueError, match="the losses of the first 2 passes would have no gradient"):
        model(TOKENS, shift_labels=LABELS, pass_weights=(0.0, 0.5, 0.0, 0.5), backward_passes=2)
    loss = model(TOKENS, shift_labels=LABELS, pass_weights=(0.0, 0.0, 0.5, 0.5), backward_passes=2).loss
    assert any(gradient.any() for gradient in gradients(model, loss))
