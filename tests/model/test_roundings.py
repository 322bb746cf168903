"""What narrow numbers lose: only what they must. The operands are rounded; logits, slopes and entropies are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ponder_scale.model.pondering_embedding import cross_entropy, pondering_embedding
from ponder_scale.model.readout import Readout

NARROW = [torch.bfloat16, torch.float16]
TOKENS, WIDTH, VOCABULARY = 24, 64, 503


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def large_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head whose logits reach over 50, where bf16 has steps of 0.25."""
    return draw(TOKENS, WIDTH, seed=0).mul(2).to(dtype), draw(VOCABULARY, WIDTH, seed=1).to(dtype), labels()


def labels() -> Tensor:
    return torch.arange(TOKENS) % VOCABULARY


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", [{"backend": "chunked"}, {"backend": "eager"}, {"top_k": 5}, {"temperature": 0.7}])
def test_statistics_of_a_pass_come_from_logits_that_were_not_rounded(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    hidden, head, targets = large_logits(dtype)
    _, seen = pondering_embedding(hidden, head, head, labels=targets, **options)
    wide = {**options, "backend": "eager"}
    _, wanted = pondering_embedding(hidden.double(), head.double(), head.double(), labels=targets, **wide)
    assert (hidden.double() @ head.double().t()).abs().max() > 50
    assert (seen.loss - wanted.loss).abs().max() < 1e-4
    assert (seen.entropy - wanted.entropy).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", NARROW)
def test_the_loss_comes_from_logits_that_were_not_rounded(dtype: torch.dtype) -> None:
    hidden, head, targets = large_logits(dtype)
    _, seen = cross_entropy(hidden, head, targets)
    logits = hidden.double() @ head.double().t()
    wanted = nn.functional.cross_entropy(logits, targets, reduction="none")
    assert (seen.loss - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_row_that_all_embeddings_share_leaves_the_gradients_exact(dtype: torch.dtype, tied: bool) -> None:
    """With a common row of norm 40 beside embeddings of norm 8; it has no effect on the gradients to h and W."""
    common = 5.0 * draw(WIDTH, seed=3)
    table = (draw(VOCABULARY, WIDTH, seed=2) + common).to(dtype)
    head = table if tied else (draw(VOCABULARY, WIDTH, seed=1) * 0.3).to(dtype)
    hidden = (draw(TOKENS, WIDTH, seed=0) * 0.3).to(dtype)
    upstream = draw(TOKENS, WIDTH, seed=4).to(dtype)
    found = []
    for kind, backend in ((dtype, "chunked"), (torch.float64, "eager")):
        tensors = (hidden, head) if tied else (hidden, head, table)
        leaves = [tensor.to(kind, copy=True).requires_grad_() for tensor in tensors]
        mixed, _ = pondering_embedding(*leaves, *(leaves[1:] if tied else ()), backend=backend)
        mixed.backward(upstream.to(kind))
        found.append([mixed, *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(*found, strict=True):
        assert relative(got, wanted) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


def test_entropies_in_fp32_are_exact_to_a_ten_thousandth_over_a_large_vocabulary() -> None:
    vocabulary = 50_257
    hidden, head = draw(16, WIDTH, seed=0), draw(vocabulary, WIDTH, seed=1)
    hidden *= torch.logspace(-1, 0.5, 16).unsqueeze(1)  # from nearly even to all on a few
    head += 4.0  # logits of up to a hundred that say nothing
    targets = torch.arange(16)
    logits = hidden.double() @ head.double().t()
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    model = nn.Module()
    model.config = type("Config", (), {"hidden_size": WIDTH, "scale_embeds": False, "vocab_size": vocabulary})()
    layer = nn.Linear(WIDTH, vocabulary)  # with a bias, so that the module itself is called
    with torch.no_grad():
        layer.weight.copy_(head)
        layer.bias.zero_()
    model.get_output_embeddings, model.get_input_embeddings = lambda: layer, lambda: layer
    found = {
        "chunked": pondering_embedding(hidden, head, head, labels=targets, backend="chunked")[1],
        "sdpa": pondering_embedding(hidden, head, head, labels=targets, backend="sdpa")[1],
        "sdpa untied": pondering_embedding(hidden, head, head.clone(), labels=targets, backend="sdpa")[1],
        "eager": pondering_embedding(hidden, head, head, labels=targets, backend="eager")[1],
        "loss": cross_entropy(hidden, head, targets)[1],
        "a head that is called": Readout(model).cross_entropy(hidden, targets)[1],
    }
    for way, seen in found.items():
        assert (seen.entropy - wanted).abs().max() < 1e-4, (way, (seen.entropy - wanted).abs().max())


@pytest.mark.parametrize("options", [{"backend": "chunked"}, {"top_k": 4}])
def test_gradients_in_fp16_do_not_overflow_on_the_way(options: dict[str, Any]) -> None:
    """A loss scaled by 2^16 makes dz larger than fp16 holds, and the product with a small head not."""
    hidden = draw(TOKENS, WIDTH, seed=0).half()
    head = (draw(VOCABULARY, WIDTH, seed=1) * 2**-10).half()
    table = (draw(VOCABULARY, WIDTH, seed=2) * 8).half()
    upstream = (draw(TOKENS, WIDTH, seed=4) * 2**12).half()
    upstream[5:] *= 2.0**-8  # of most tokens it is small
    found = []
    for kind, backend in ((torch.float16, options.get("backend", "auto")), (torch.float64, "eager")):
        leaves = [tensor.to(kind, copy=True).requires_grad_() for tensor in (hidden * 2**6, head, table)]
        mixed, _ = pondering_embedding(*leaves, **{**options, "backend": backend}, temperature=0.1)
        gradients = torch.autograd.grad(mixed, leaves[:2], upstream.to(kind))
        found.append(gradients[0])
    assert found[1].abs().max() < 65504
    assert relative(found[0], found[1]) < 2e-3


def test_the_gradient_of_a_scaled_loss_in_fp16_is_finite() -> None:
    """The first scale of DeepSpeed is 2^16, which fp16 does not hold."""
    hidden, head = (draw(rows, WIDTH, seed=rows).mul(0.02).half().requires_grad_() for rows in (TOKENS, VOCABULARY))
    total, _ = cross_entropy(hidden, head, labels())
    (total * 2.0**16).backward()
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    (cross_entropy(*leaves, labels())[0] * 2.0**16).backward()
    for got, wanted in zip((hidden, head), leaves, strict=True):
        assert wanted.grad.abs().max() < 65504
        assert relative(got.grad, wanted.grad) < 2e-3
