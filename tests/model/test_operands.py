"""Operands of the op that are laid out oddly, have no data or do not fit: the right result, or a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ponder_scale.model.pondering_embedding import cross_entropy, pondering_embedding

TOKENS, WIDTH, VOCABULARY = 70, 48, 90  # beyond the kernels' vector widths
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "column-major": lambda t: t.t().contiguous().t(),
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "columns of a wider matrix": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "one row expanded": lambda t: t[:1].expand_as(t),
    "one column expanded": lambda t: t[:, :1].expand_as(t),
}


def operands(tied: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, head, table = (torch.randn(n, WIDTH, generator=generator) for n in (TOKENS, VOCABULARY, VOCABULARY))
    return [hidden, head, head if tied else table]


# with one row for the whole vocabulary every token is as probable as any other, and gradients are zero
CASES = [(layout, which) for layout in LAYOUTS for which in range(4) if layout != "one row expanded" or which in (0, 3)]


@pytest.mark.parametrize(("layout", "which"), CASES)
@pytest.mark.parametrize("backend", ["auto", "chunked", "sdpa", "top_k", "eager"])
def test_the_layout_of_an_operand_changes_nothing(layout: str, which: int, backend: str) -> None:
    given = operands()
    if which < 3:
        given[which] = LAYOUTS[layout](given[which])
    upstream = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    upstream = LAYOUTS[layout](upstream) if which == 3 else upstream
    options = {"top_k": 7} if backend == "top_k" else {}
    leaves = [tensor.detach().requires_grad_() for tensor in given]  # detach keeps the strides
    mixed, _ = pondering_embedding(*leaves, backend=backend, **options)
    mixed.backward(upstream)
    hidden, head, table = (tensor.detach().double().contiguous().requires_grad_() for tensor in given)
    logits = hidden @ head.t()
    if options:
        logits = logits.masked_fill(logits < logits.topk(7).values[:, -1:], -torch.inf)
    expected = logits.softmax(-1) @ table
    expected.backward(upstream.double())
    for got, wanted in zip(
        (mixed, *(leaf.grad for leaf in leaves)), (expected, hidden.grad, head.grad, table.grad), strict=True
    ):
        error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-6)
        assert error < 1e-5, (layout, which, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1])
def test_the_layout_changes_no_loss(layout: str, which: int) -> None:
    given = operands()[:2]
    given[which] = LAYOUTS[layout](given[which])
    labels = torch.arange(2 * TOKENS)[::2] % VOCABULARY  # not side by side either
    total, statistics = cross_entropy(*given, labels)
    expected = F.cross_entropy(given[0].double() @ given[1].double().t(), labels, reduction="none")
    torch.testing.assert_close(statistics.loss.double(), expected, atol=1e-4, rtol=1e-5)
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("label", [-1, -99, -101, VOCABULARY, 10**6])
@pytest.mark.parametrize("backend", ["auto", "chunked", "sdpa", "top_k", "eager"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_label_that_is_no_token_is_refused(label: int, backend: str, tied: bool) -> None:
    hidden, head, table = operands(tied)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    labels[3] = label
    with pytest.raises(ValueError, match=rf"label {label} is not a token of the vocabulary \(0 to 89\)"):
        pondering_embedding(
            hidden, head, table, labels=labels, backend=backend, top_k=5 if backend == "top_k" else None
        )
    with pytest.raises(ValueError, match=rf"label {label} is not a token"):
        cross_entropy(hidden, head, labels)
    labels[3] = -100
    assert cross_entropy(hidden, head, labels)[1].loss[3] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_statistics_of_narrow_attention_are_refused_and_auto_has_them_right(dtype: torch.dtype, tied: bool) -> None:
    given = [tensor.mul(3).to(dtype) for tensor in operands()]
    given[2] = given[1] if tied else given[2]
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"backend 'sdpa' cannot take labels with {dtype}"):
        pondering_embedding(*given, labels=labels, backend="sdpa")
    pondering_embedding(*given, backend="sdpa")
    _, statistics = pondering_embedding(*given, labels=labels)
    logits = given[0].double() @ given[1].double().t()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert (statistics.entropy.double() - entropy).abs().max() < 0.1


def test_operands_without_data_or_of_another_place_are_refused() -> None:
    for backend in ("auto", "chunked", "sdpa", "eager"):
        for which, name in enumerate(("hidden", "head", "table")):
            given = operands()
            given[which] = given[which].to("meta")
            with pytest.raises(ValueError, match=f"{name} is on the meta device, so it has no data"):
                pondering_embedding(*given, backend=backend)
    hidden, head, _ = operands()
    with pytest.raises(ValueError, match="head is on the meta device"):
        cross_entropy(hidden, head.to("meta"), torch.zeros(TOKENS, dtype=torch.int64))
    for empty in (torch.empty(0), torch.empty(VOCABULARY, WIDTH - 1), torch.empty(VOCABULARY - 1, WIDTH)):
        with pytest.raises(ValueError, match=r"has the shape .*; expected one row of width 48 for each token"):
            pondering_embedding(hidden, head, empty)
    with pytest.raises(ValueError, match="if ZeRO-3 keeps it partitioned, gather it first"):
        pondering_embedding(hidden, torch.empty(0), torch.empty(0))


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("temperature", -1.0), ("top_k", 0), ("top_k", -3)])
def test_a_setting_out_of_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
        pondering_embedding(*operands(), **{name: value})
