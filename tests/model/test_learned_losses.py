"""The loss of each token as the pondering embedding's operators give it, when it is learned: against float64 loops.

What is differentiated is <upstream, T> + sum_n a_n loss_n, with other a for every token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ponder_scale.model import backends as module
from ponder_scale.model import operators
from ponder_scale.model.pondering_embedding import choose_backend, pondering_embedding
from tests.model.inside import Inside
from tests.model.mixtures import CASES, TOKENS, VOCABULARY, WIDTH, by_loops, operands

LABELS = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
LABELS[::4] = -100
CASES = [(options, way) for options, way in CASES if not (way == "sdpa" and "temperature" in options)]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 5 * VOCABULARY)


def above(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the mixture and of the losses."""
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    return upstream.to(dtype), torch.rand(TOKENS, dtype=torch.float64, generator=generator)


def losses_by_loops(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """-log softmax(h W^T)[label] at temperature 1, one token and one vocabulary entry at a time."""
    losses = []
    for h, label in zip(hidden, LABELS.tolist(), strict=True):
        y = torch.stack([(h * w).sum() for w in head])
        losses.append(torch.log(sum(torch.exp(each) for each in y)) - y[label] if label >= 0 else 0.0 * h.sum())
    return torch.stack(losses)


def learned(tensors: list[torch.Tensor], backend: str, **options: Any) -> list[torch.Tensor]:
    """The losses, and the gradients of all three operands."""
    upstream, slopes = above(tensors[0].dtype)
    mixed, seen = pondering_embedding(*tensors, labels=LABELS, learn=True, backend=backend, **options)
    torch.autograd.backward([mixed, seen.loss], [upstream, slopes.to(seen.loss.dtype)])
    return [seen.loss, *(tensor.grad for tensor in tensors)]


def by_the_equation(tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    upstream, slopes = above(torch.float64)
    losses = losses_by_loops(*tensors[:2])
    ((by_loops(*tensors, **options) * upstream).sum() + (losses * slopes).sum()).backward()
    return [losses, *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize(("options", "backend"), CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_are_those_of_the_equation(options: dict[str, Any], tied: bool, backend: str) -> None:
    got = learned(operands(torch.float64, tied), backend, **options)
    for ours, wanted in zip(got, by_the_equation(operands(torch.float64, tied), **options), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("options", "backend"), CASES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_narrow_dtypes_are_as_close_as_they_can_be(
    options: dict[str, Any], backend: str, dtype: torch.dtype, bound: float
) -> None:
    """Of the same inputs, relative to the norm of what is compared."""
    if backend == "sdpa" and dtype != torch.float32:
        pytest.skip("attention has no statistics in narrow dtypes")
    ours = [tensor.detach().to(dtype).requires_grad_() for tensor in operands(torch.float64)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    for got, wanted in zip(learned(ours, backend, **options), by_the_equation(theirs, **options), strict=True):
        assert (got.double() - wanted).norm() / wanted.norm() < bound


def test_a_loss_scale_that_fp16_cannot_hold_leaves_gradients_that_it_can() -> None:
    for options, backend in CASES:
        if backend == "sdpa":
            continue
        ours = [(tensor.detach() * 0.01).half().requires_grad_() for tensor in operands(torch.float64)]
        theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
        _, seen = pondering_embedding(*ours, labels=LABELS, learn=True, backend=backend, **options)
        (seen.loss.sum() * 2.0**17).backward()
        (losses_by_loops(*theirs[:2]).sum() * 2.0**17).backward()
        for got, wanted in zip(ours[:2], theirs[:2], strict=True):
            assert (got.grad.double() - wanted.grad).norm() / wanted.grad.norm() < 2e-3, (options, backend)


@pytest.mark.slow  # finite differences of every element
@pytest.mark.parametrize(("options", "backend"), CASES)
def test_gradcheck_of_mixture_and_losses(options: dict[str, Any], backend: str) -> None:
    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed, seen = pondering_embedding(*tensors, labels=LABELS, learn=True, backend=backend, **options)
        return mixed, seen.loss

    assert torch.autograd.gradcheck(both, operands(torch.float64))


@pytest.mark.parametrize(("options", "backend"), CASES)
def test_learning_changes_nothing_of_forward_and_no_slopes_change_nothing_of_backward(
    options: dict[str, Any], backend: str
) -> None:
    found = []
    for learn in (False, True):
        tensors = operands(torch.float32)
        mixed, seen = pondering_embedding(*tensors, labels=LABELS, learn=learn, backend=backend, **options)
        assert seen.loss.requires_grad == learn and not seen.entropy.requires_grad
        mixed.square().sum().backward()
        found.append([mixed, *seen, *(tensor.grad for tensor in tensors)])
    assert all(torch.equal(*pair) for pair in list(zip(*found, strict=True))[:3])
    for ours, wanted in zip(found[1][3:], found[0][3:], strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)


def products(learn: bool, **options: Any) -> int:
    """Products with the vocabulary that forward and backward take together, in one block each."""
    tensors = operands(torch.float64)
    with Inside() as inside:
        mixed, seen = pondering_embedding(*tensors, labels=LABELS, learn=learn, **options)
        torch.autograd.backward(
            [mixed, seen.loss] if learn else [mixed], [torch.ones_like(mixed), torch.ones(TOKENS).double()][: 1 + learn]
        )
    return sum(inside.calls[name] for name in ("mm", "addmm", "addmm_", "linear"))


def test_learned_losses_take_no_product_with_the_vocabulary_but_three_beside_the_most_probable_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", TOKENS * VOCABULARY)
    for temperature in (1.0, 0.7):
        options: dict[str, Any] = {"temperature": temperature, "backend": "chunked"}
        assert products(False, **options) == products(True, **options) == 7
    assert products(False, top_k=4) == 1
    assert products(True, top_k=4) == 4


def test_nothing_as_large_as_tokens_times_vocabulary_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, width, vocabulary = 256, 4, 64
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 8 * vocabulary)
    hidden = torch.randn(tokens, width, requires_grad=True)
    head, table = (torch.randn(vocabulary, width, requires_grad=True) for _ in range(2))
    labels = torch.zeros(tokens, dtype=torch.int64)
    for options in (
        {"backend": "chunked"},
        {"backend": "chunked", "temperature": 0.7},
        {"backend": "sdpa"},
        {"top_k": 8},
    ):
        with Inside() as inside:
            mixed, seen = pondering_embedding(hidden, head, table, labels=labels, learn=True, **options)
            (mixed.sum() + seen.loss.sum()).backward()
        assert 0 < inside.largest <= max(tokens * (width + 1), 8 * vocabulary, tokens * 8, vocabulary * (width + 1))


def test_gradients_are_made_only_of_what_asks_for_them() -> None:
    for options, backend in CASES:
        for wanted in range(3):
            whole, alone = operands(torch.float64), operands(torch.float64)
            for number, tensor in enumerate(alone):
                tensor.requires_grad_(number == wanted)
            for tensors in (whole, alone):
                mixed, seen = pondering_embedding(*tensors, labels=LABELS, learn=True, backend=backend, **options)
                (mixed.square().sum() + seen.loss.sum()).backward()
            torch.testing.assert_close(alone[wanted].grad, whole[wanted].grad)
            assert [tensor.grad is not None for tensor in alone] == [number == wanted for number in range(3)]


def test_no_label_that_counts_is_no_gradient() -> None:
    """Scores so far apart that the softmax of an ignored token must not be computed from its label's logit."""
    labels = torch.full((TOKENS,), -100)
    for options, backend in CASES:
        tensors = [(tensor.detach() * 30).requires_grad_() for tensor in operands(torch.float32)]
        _, seen = pondering_embedding(*tensors, labels=labels, learn=True, backend=backend, **options)
        seen.loss.sum().backward()
        assert all(tensor.grad is None or not tensor.grad.any() for tensor in tensors), (options, backend)


def test_what_cannot_be_learned_is_refused() -> None:
    tensors = operands(torch.float32, tied=True)
    with pytest.raises(ValueError, match="learn needs labels"):
        pondering_embedding(*tensors, learn=True)
    with pytest.raises(ValueError, match=r"'sdpa' cannot learn from a loss at a temperature of 0.7"):
        pondering_embedding(*tensors, labels=LABELS, learn=True, temperature=0.7, backend="sdpa")
    options: dict[str, Any] = {"top_k": None, "statistics": True}
    assert choose_backend(*tensors, temperature=1.0, **options) == "sdpa"
    assert choose_backend(*tensors, temperature=0.7, **options) == "chunked"


def test_unlearned_losses_call_the_operators_as_before() -> None:
    """No argument of an operator names what is learned, so that graphs and compiled code are those of before."""
    seen: list[tuple[str, int]] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == operators.NAMESPACE:
                seen.append((function.overloadpacket.__name__, len(args) + len(kwargs or {})))
            return function(*args, **(kwargs or {}))

    for learn in (False, True):
        with Calls():
            for top_k in (None, 4):
                mixed, found = pondering_embedding(
                    *operands(torch.float64), labels=LABELS, top_k=top_k, learn=learn, backend="auto"
                )
                (mixed.sum() + found.loss.sum()).backward()
    assert seen[:4] == [("mixture", 9), ("mixture_gradients", 13), ("top_k", 7), ("top_k_gradients", 9)]
    assert seen[4:] == [("mixture", 10), ("mixture_gradients", 16), ("top_k", 8), ("top_k_gradients", 12)]
