"""Every backend that runs on a CPU against the formula in float64: values, gradients, statistics, memory.

Answers: logits of the whole vocabulary that fill the memory (Automodel 3907, trl 5575).
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from ponder_scale.model import backends as module
from ponder_scale.model.pondering_embedding import (
    FEW,
    choose_backend,
    cross_entropy,
    is_decoded,
    pondering_embedding,
    row_logits,
)
from tests.model.inside import Inside
from tests.model.mixtures import CASES, TOKENS, VOCABULARY, WIDTH, by_loops, operands


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 5 * VOCABULARY)


@pytest.mark.parametrize(("options", "backend"), CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_value_and_gradients_are_those_of_the_equation(options: dict[str, Any], tied: bool, backend: str) -> None:
    ours, theirs = operands(torch.float64, tied), operands(torch.float64, tied)
    upstream = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    mixed, _ = pondering_embedding(*ours, **options, backend=backend)
    expected = by_loops(*theirs, **options)
    mixed.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(mixed, expected, atol=1e-12, rtol=1e-12)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("options", "backend"), CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_fp32_is_within_1e_6_of_float64(options: dict[str, Any], tied: bool, backend: str) -> None:
    """Of the same fp32 inputs, relative to the norm of what is compared."""
    narrow = [tensor.detach().float().requires_grad_() for tensor in operands(torch.float64, tied)]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    if tied:
        narrow[2], wide[2] = narrow[1], wide[1]
    upstream = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))
    value, _ = pondering_embedding(*narrow, **options, backend=backend)
    expected, _ = pondering_embedding(*wide, **options, backend="eager")
    value.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(value, expected), *((got.grad, wanted.grad) for got, wanted in zip(narrow, wide, strict=True))]
    for got, wanted in pairs:
        assert (got - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize(("options", "backend"), CASES)
def test_gradcheck(options: dict[str, Any], backend: str) -> None:
    assert torch.autograd.gradcheck(
        lambda *tensors: pondering_embedding(*tensors, **options, backend=backend)[0], operands(torch.float64)
    )


def test_gradcheck_of_the_loss() -> None:
    labels = torch.arange(TOKENS) % VOCABULARY
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, labels)[0], operands(torch.float64)[:2])


@pytest.mark.parametrize(("options", "backend"), CASES)
def test_bf16_is_as_close_as_bf16_can_be(options: dict[str, Any], backend: str) -> None:
    ours = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in operands(torch.float64)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    mixed, _ = pondering_embedding(*ours, **options, backend=backend)
    expected = by_loops(*theirs, **options)
    mixed.sum().backward()
    expected.sum().backward()
    assert mixed.dtype == torch.bfloat16
    assert (mixed.double() - expected).abs().max() / expected.abs().max() < 2e-2
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got.grad.double() - wanted.grad).abs().max() / wanted.grad.abs().max() < 4e-2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("backend", "top_k"),
    [("chunked", None), ("sdpa", None), ("eager", None), ("top_k", 4), ("eager", 4), ("auto", None), ("auto", 4)],
)
def test_statistics_are_loss_and_entropy_of_each_token(
    temperature: float, tied: bool, backend: str, top_k: int | None
) -> None:
    hidden, head, table = operands(torch.float32, tied)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    labels[::4] = -100
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "backend": backend}
    mixed, statistics = pondering_embedding(hidden, head, table, labels=labels, scale=1.7, **options)
    logits = hidden @ head.t()
    torch.testing.assert_close(statistics.loss, F.cross_entropy(logits, labels, reduction="none"))
    kept = (logits / temperature).topk(top_k or VOCABULARY).values
    entropy = torch.distributions.Categorical(logits=kept).entropy()
    torch.testing.assert_close(statistics.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert mixed.requires_grad and not statistics.loss.requires_grad
    if backend != "auto":  # statistics never change the result of a backend
        alone, none = pondering_embedding(hidden, head, table, scale=1.7, **options)
        assert none is None and torch.equal(alone, mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_is_torchs(dtype: torch.dtype) -> None:
    ours, theirs = operands(dtype)[:2], operands(dtype)[:2]
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    labels[3] = -100
    total, statistics = cross_entropy(*ours, labels)
    expected = F.cross_entropy(theirs[0] @ theirs[1].t(), labels, reduction="sum")
    (total * 0.25).backward()
    (expected * 0.25).backward()
    torch.testing.assert_close(total.to(dtype), expected, atol=1e-5, rtol=1e-6)
    assert statistics.loss[3] == 0
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=2e-6, rtol=2e-6)


def test_z_loss_is_the_squared_log_sum_exp_with_its_exact_gradient() -> None:
    ours, theirs = operands(torch.float64)[:2], operands(torch.float64)[:2]
    labels = torch.arange(TOKENS) % VOCABULARY
    labels[3] = -100
    total, statistics = cross_entropy(*ours, labels, z_loss=0.3)
    logits = theirs[0] @ theirs[1].t()
    plain = F.cross_entropy(logits, labels, reduction="none")
    expected = plain.sum() + 0.3 * logits.logsumexp(-1)[labels != -100].square().sum()
    total.backward()
    expected.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(statistics.loss, plain)  # without it
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)
    assert torch.autograd.gradcheck(
        lambda h, w: cross_entropy(h, w, labels, z_loss=0.3)[0], operands(torch.float64)[:2]
    )


def test_only_one_chunk_of_the_vocabulary_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor with as many elements as tokens x vocabulary is made, forward or backward."""
    tokens, width, vocabulary = 256, 4, 64
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 8 * vocabulary)
    hidden = torch.randn(tokens, width, requires_grad=True)
    head, table = (torch.randn(vocabulary, width, requires_grad=True) for _ in range(2))
    labels = torch.zeros(tokens, dtype=torch.int64)
    for top_k, backend in ((None, "chunked"), (None, "sdpa"), (8, "top_k")):
        with Inside() as inside:
            mixed, _ = pondering_embedding(hidden, head, table, labels=labels, top_k=top_k, backend=backend)
            (mixed.sum() + cross_entropy(hidden, head, labels)[0]).backward()
        assert 0 < inside.largest <= max(tokens * width, 8 * vocabulary, tokens * 8, vocabulary * width)


@pytest.mark.parametrize("backend", ["auto", "chunked", "sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True])
def test_autocast_computes_in_its_dtype(backend: str, tied: bool) -> None:
    hidden, head, table = operands(torch.float32, tied)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = pondering_embedding(hidden, head, table, backend=backend)
    mixed.float().sum().backward()
    assert mixed.dtype == torch.bfloat16
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("top_k", [None, 4])
def test_compiled_code_around_it_gives_the_same(labelled: bool, top_k: int | None) -> None:
    labels = torch.arange(TOKENS) % VOCABULARY

    def around(hidden: torch.Tensor, head: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(hidden) * 2.0
        mixed, _ = pondering_embedding(hidden, head, table, labels=labels if labelled else None, top_k=top_k)
        return (hidden + mixed).square().sum() + cross_entropy(hidden + mixed, head, labels)[0]

    torch.compiler.reset()
    ours, theirs = operands(torch.float64), operands(torch.float64)
    got = torch.compile(around, backend="aot_eager", fullgraph=True)(*ours)
    wanted = around(*theirs)
    got.backward()
    wanted.backward()
    torch.testing.assert_close(got, wanted)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_same_inputs_give_the_same_bits() -> None:
    labels = torch.arange(TOKENS) % VOCABULARY
    for options, backend in CASES:
        runs = []
        for _ in range(2):
            tensors = operands(torch.float32)
            mixed, seen = pondering_embedding(*tensors, **options, labels=labels, backend=backend)
            mixed.sum().backward()
            runs.append([mixed, seen.loss, seen.entropy, *(tensor.grad for tensor in tensors)])
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True)), (options, backend)


def test_gradients_are_made_only_of_what_asks_for_them() -> None:
    for backend in ("chunked", "sdpa"):
        for wanted in range(3):
            whole, alone = operands(torch.float64), operands(torch.float64)
            for number, tensor in enumerate(alone):
                tensor.requires_grad_(number == wanted)
            for tensors in (whole, alone):
                pondering_embedding(*tensors, backend=backend)[0].square().sum().backward()
            torch.testing.assert_close(alone[wanted].grad, whole[wanted].grad)
            assert [tensor.grad is not None for tensor in alone] == [number == wanted for number in range(3)]


def test_auto_takes_attention_only_where_the_statistics_are_free() -> None:
    hidden, head, table = operands(torch.float32)
    options: dict[str, Any] = {"temperature": 1.0, "top_k": None, "statistics": True}
    assert choose_backend(hidden, head, table, **options) == "chunked"
    assert choose_backend(hidden, head, table, **{**options, "statistics": False}) == "sdpa"
    assert choose_backend(hidden, head, head, **options) == "sdpa"
    assert choose_backend(hidden, head, head, **{**options, "temperature": 0.7}) == "chunked"
    assert choose_backend(hidden.bfloat16(), head, head, **options) == "chunked"
    assert choose_backend(hidden, head, table, **{**options, "top_k": 4}) == "top_k"


def test_no_tokens_give_no_embeddings() -> None:
    _, head, table = operands(torch.float32)
    for backend in ("auto", "chunked"):
        mixed, _ = pondering_embedding(torch.zeros(2, 0, WIDTH), head, table, backend=backend)
        assert mixed.shape == (2, 0, WIDTH)


def test_a_backend_that_cannot_do_it_is_refused() -> None:
    tensors = operands(torch.float32)
    with pytest.raises(ValueError, match="backend is 'fast'; expected one of auto, eager"):
        pondering_embedding(*tensors, backend="fast")
    with pytest.raises(ValueError, match="'sdpa' mixes the whole vocabulary; with top_k=4 use 'auto' or 'top_k'"):
        pondering_embedding(*tensors, top_k=4, backend="sdpa")
    with pytest.raises(ValueError, match="backend 'top_k' needs top_k"):
        pondering_embedding(*tensors, backend="top_k")
    with pytest.raises(ValueError, match="backend 'sdpa' cannot take no tokens"):
        pondering_embedding(tensors[0][:0], *tensors[1:], backend="sdpa")
    with pytest.raises(ValueError, match="backend of the loss is 'sdpa'"):
        cross_entropy(*tensors[:2], torch.zeros(TOKENS, dtype=torch.int64), backend="sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_a_few_tokens_without_gradients_are_those_of_the_equation(tokens: int, dtype: torch.dtype) -> None:
    """On a CPU they do not take the products of many tokens, see `pondering_embedding.is_decoded`."""
    generator = torch.Generator().manual_seed(tokens)
    hidden, head, table = (torch.randn(rows, 24, generator=generator, dtype=dtype) for rows in (tokens, 301, 301))
    labels = torch.arange(tokens)
    with torch.no_grad():
        for given in ({}, {"labels": labels}, {"temperature": 0.7, "scale": 3.0}, {"top_k": 11}):
            with torch.enable_grad():  # otherwise the equation, too, would sum the table row by row
                exact, seen = pondering_embedding(
                    hidden.double(), head.double(), table.double(), backend="eager", **given
                )
            found, statistics = pondering_embedding(hidden, head, table, **given)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)
            if seen is not None and statistics is not None:
                torch.testing.assert_close(statistics.loss.double(), seen.loss, atol=tolerance, rtol=tolerance)
        logits = row_logits(hidden, head).double()
        torch.testing.assert_close(logits, hidden.double() @ head.double().t(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_a_few_tokens_without_gradients_need_no_product_of_the_library(tokens: int) -> None:
    """Its product of one token with the head takes twice as long as to read the head row by row."""
    hidden, head, table = (torch.randn(rows, 24) for rows in (tokens, 301, 301))
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
        pondering_embedding(hidden, head, table)
    done = {event.name for event in profiler.events() or []}
    assert ("aten::_embedding_bag_per_sample_weights_backward" in done) == (tokens <= FEW)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert bool(done & {"aten::mm", "aten::addmm", "aten::bmm", attention}) == (tokens > FEW)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_decoded(hidden)  # there, the model's own head computes logits in bf16
    assert not is_decoded(hidden)  # with gradients


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: nothing is compiled")
@pytest.mark.parametrize("top_k", [None, 11])
def test_one_compiled_token_without_gradients_is_that_of_the_equation(top_k: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, head, table = (torch.randn(rows, 24, generator=generator) for rows in (1, 301, 301))
    options = {"temperature": 0.7, "scale": 3.0, "top_k": top_k}
    compiled = torch.compile(lambda *operands: pondering_embedding(*operands, **options)[0], fullgraph=True)
    with torch.no_grad():
        exact, _ = pondering_embedding(hidden.double(), head.double(), table.double(), backend="eager", **options)
        torch.testing.assert_close(compiled(hidden, head, table).double(), exact, atol=1e-5, rtol=1e-5)
