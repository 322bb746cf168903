"""The operators as torch's compiler sees them: their shapes, their gradients, one graph of the whole model."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.cache_utils import StaticCache

from ponder_scale.model import operators
from ponder_scale.model.pondering_embedding import pondering_embedding
from tests.model.architectures import TINY, VOCABULARY, make_confident

TOKENS, WIDTH = 5, 6
PROMPT = torch.tensor([[5, 11, 3, 42, 7, 19, 28, 1, 33], [8, 2, 50, 13, 21, 4, 17, 39, 6]])
LABELS = PROMPT.where(PROMPT % 5 > 0, -100)
# what differs in the graph: every feedback and residual, the sparse mixture, two tables or one
VARIANTS: list[dict[str, Any]] = [
    {"scale_embeds": True},
    {"pondering_top_k": 7, "tie_word_embeddings": True, "residual": "restart"},
    {"feedback": "hidden", "residual": "replace"},
    {"pondering_temperature": 0.8, "residual": "replace", "tie_word_embeddings": True},
]
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.enable_grad():  # an error in compiled code can leave the mode of gradients as it was there
        yield
    torch._dynamo.reset()


def operands(dtype: torch.dtype, needed: tuple[bool, ...] = (True, True, True)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY, WIDTH))
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(asked) for tensor, asked in zip(made, needed, strict=True)]


def check(operator: Any, *arguments: Any) -> None:
    assert torch.library.opcheck(operator, arguments) == dict.fromkeys(UTILITIES, "SUCCESS")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "labelled"), [("chunked", True), ("chunked", False), ("sdpa", False)])
def test_the_mixture_is_the_operator_that_it_is_declared_to_be(
    dtype: torch.dtype, backend: str, labelled: bool
) -> None:
    labels = torch.arange(TOKENS) if labelled else None
    check(operators.mixture, *operands(dtype), labels, 0.7, 2.5, backend, False, True)
    check(operators.mixture, *operands(dtype, (False, False, False)), labels, 1.0, 1.0, backend, False, False)
    hidden, head, _ = operands(dtype, (True, True, True))
    check(operators.mixture, hidden, head, head, labels, 1.0, 1.0, backend, True, True)
    check(operators.mixture, *operands(dtype, (True, False, False)), labels, 1.0, 1.0, backend, False, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_and_the_loss_are_the_operators_that_they_are_declared_to_be(dtype: torch.dtype) -> None:
    labels = torch.tensor([3, -100, 60, 0, 7])
    check(operators.top_k, *operands(dtype), labels, 0.7, 2.5, 4)
    check(operators.top_k, *operands(dtype, (False, True, False)), None, 1.0, 1.0, 4)
    check(operators.loss, *operands(dtype)[:2], labels, 0.1, "chunked", True, True)
    check(operators.loss, *operands(dtype, (True, False, False))[:2], labels, 0.0, "chunked", True, False)
    check(operators.times, operands(dtype, (False, False, False))[0], torch.tensor(2.0))


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "sdpa"), (torch.bfloat16, "chunked")])
def test_the_gradients_are_operators_too(needed: tuple[bool, ...], dtype: torch.dtype, backend: str) -> None:
    tensors = operands(dtype, (False, False, False))
    mixed, _, _, mean, *kept = operators.mixture(*tensors, None, 1.0, 2.0, backend, False, True)
    check(operators.mixture_gradients, mixed, *tensors, mean, *kept, 1.0, 2.0, backend, False, list(needed))
    mixed, _, _, *kept = operators.top_k(*tensors, None, 1.0, 2.0, 4)
    check(operators.top_k_gradients, mixed, *tensors, *kept, 1.0, 2.0, list(needed))


@pytest.mark.parametrize(
    ("dtype", "backend", "temperature"),
    [(torch.float32, "chunked", 1.0), (torch.bfloat16, "chunked", 0.7), (torch.float32, "sdpa", 1.0)],
)
def test_operators_of_losses_that_are_learned_are_those_that_they_are_declared_to_be(
    dtype: torch.dtype, backend: str, temperature: float
) -> None:
    labels, options = torch.tensor([3, -100, 60, 0, 7]), (temperature, 2.5)
    check(operators.mixture, *operands(dtype), labels, *options, backend, False, True, True)
    hidden, head, _ = operands(dtype)
    check(operators.mixture, hidden, head, head, labels, *options, backend, True, True, True)
    check(operators.mixture, *operands(dtype, (True, False, False)), labels, *options, backend, False, True, True)
    check(operators.top_k, *operands(dtype), labels, *options, 4, True)
    check(operators.top_k, *operands(dtype, (False, True, False)), labels, *options, 4, True)
    tensors = operands(dtype, (False, False, False))
    mixed, loss, _, mean, *kept = operators.mixture(*tensors, labels, *options, backend, False, True, True)
    mean = mean if mean.numel() else mixed
    learned = labels, loss, torch.rand_like(loss)
    for needed in ([True, True, True], [False, True, False]):
        check(operators.mixture_gradients, mixed, *tensors, mean, *kept, *options, backend, False, needed, *learned)
    mixed, loss, _, *picked = operators.top_k(*tensors, labels, *options, 4, True)
    check(operators.top_k_gradients, mixed, *tensors, *picked, *options, [True, True, True], *learned)


def test_the_gradient_of_a_gradient_is_refused() -> None:
    hidden, head, table = operands(torch.float32)
    for options in ({}, {"top_k": 4}):
        mixed, _ = pondering_embedding(hidden, head, table, **options)
        gradient = torch.autograd.grad(mixed.sum(), hidden, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            gradient.square().sum().backward()


def case(place: int, variant: int, *values: Any) -> Any:
    """Of parameters: a compilation takes seconds, so each architecture has one variant in the fast lane."""
    return pytest.param(*values, marks=[] if place == variant else [pytest.mark.slow])


# what dynamo takes in for each of them; what comes after it is the same for all, so it is tried with one
CASES = [
    case(place, number, architecture, variant, "eager")
    for place, architecture in enumerate(TINY)
    for number, variant in enumerate(VARIANTS)
]
CASES += [case(0, -1, "llama", VARIANTS[0], "aot_eager"), case(0, -1, "llama", VARIANTS[1], "aot_eager")]


def small(architecture: str, **fields: Any) -> Any:
    return make_confident(architecture, **{"pondering_steps": 1, "num_hidden_layers": 1, **fields})


@pytest.mark.parametrize(("architecture", "variant", "backend"), CASES, ids=str)
def test_the_whole_step_is_one_graph_and_gives_the_eager_numbers(
    architecture: str, variant: dict[str, Any], backend: str
) -> None:
    model = small(architecture, **variant).train()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    check_compiled(model, compiled)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def check_compiled(model: Any, compiled: Any, **options: Any) -> None:
    found = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(PROMPT, labels=LABELS, z_loss=0.01, **options)
        output.loss.backward()
        found.append([output.loss, output.pass_losses, output.pass_entropies, *(p.grad for p in model.parameters())])
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("variant", "backend"),
    [*(case(1, n, variant, "eager") for n, variant in enumerate(VARIANTS)), case(1, -1, VARIANTS[0], "aot_eager")],
    ids=str,
)
def test_a_step_of_which_every_pass_learns_is_one_graph_too(variant: dict[str, Any], backend: str) -> None:
    model = small("llama", **{**variant, "pondering_steps": 2}).train()
    check_compiled(model, torch.compile(model, backend=backend, fullgraph=True), pass_weights=(0.25, 0.0, 0.75))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("architecture", "variant", "backend"), [*CASES, ("llama", {"pondering_steps": 0}, "eager")], ids=str
)
def test_a_decoding_step_is_one_graph_at_every_position(
    architecture: str, variant: dict[str, Any], backend: str
) -> None:
    model = small(architecture, **variant)
    cache = StaticCache(config=model.config, max_cache_len=16)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = model(PROMPT).logits
        model(PROMPT[:, :4], past_key_values=cache)
        for position in range(4, 9):
            got = compiled(PROMPT[:, position : position + 1], past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(got, expected[:, position], atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
def test_a_forward_of_other_lengths_is_compiled_once_more_for_all_of_them() -> None:
    model = small("llama").train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in range(9, 3, -1):
        compiled(PROMPT[:, :length], labels=LABELS[:, :length]).loss.backward()
    assert counters["stats"]["unique_graphs"] == 2  # the first length alone, and all others


@pytest.mark.parametrize("feedback", ["embedding", "hidden"])
def test_a_label_that_is_no_token_stops_compiled_code_too(feedback: str) -> None:
    residual = "replace" if feedback == "hidden" else "accumulate"
    model = small("llama", feedback=feedback, residual=residual).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="label 61 is not a token of the vocabulary"):
        compiled(PROMPT, labels=torch.full_like(PROMPT, VOCABULARY))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_documents_that_would_see_each_other_stop_compiled_code_too(backend: str) -> None:
    model = small("llama")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    once, twice = torch.arange(9).expand(2, 9), (torch.arange(9) % 5).expand(2, 9)
    mask = torch.ones_like(PROMPT)
    with torch.no_grad():
        got = compiled(PROMPT, attention_mask=mask, position_ids=once).logits
        torch.testing.assert_close(got, model(PROMPT).logits, atol=1e-5, rtol=1e-4)
        with pytest.raises(RuntimeError, match="position_ids start again within a row"):
            compiled(PROMPT, attention_mask=mask, position_ids=twice)


def load(name: str, folder: Path) -> ModuleType:
    """The package of a folder under a name, as loaders of remote code read it: again and again, if asked to."""
    for known in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
        del sys.modules[known]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return importlib.import_module(f"{name}.pondering_embedding")


def test_copies_of_the_code_have_operators_of_their_own() -> None:
    folder = Path(operators.__file__).parent
    tensors = operands(torch.float32)
    wanted, _ = pondering_embedding(*tensors)
    copies = [load("exported_one", folder), load("exported_two", folder), load("exported_one", folder)]
    try:
        names = {operators.NAMESPACE, *(copy.operators.NAMESPACE for copy in copies)}
        assert len(names) == 4 and "exported_one_operators_2" in names
        for copy in copies:
            got, _ = torch.compile(copy.pondering_embedding, backend="aot_eager", fullgraph=True)(*tensors)
            assert torch.equal(got, wanted)
            gradients = (torch.autograd.grad(mixed.sum(), tensors) for mixed in (got, wanted.clone()))
            for mine, other in zip(*gradients, strict=True):
                torch.testing.assert_close(mine, other)
            wanted, _ = pondering_embedding(*tensors)
    finally:
        for name in [each for each in sys.modules if each.startswith("exported_")]:
            del sys.modules[name]
