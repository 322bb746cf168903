"""What sits on the head or the table acts in feedback and loss as it does when the module is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ponder_scale.model.readout import Readout, is_plain
from tests.model.adapters import LowRank, adapt
from tests.model.architectures import TINY, VOCABULARY, make_confident
from tests.model.equations import by_the_equations

TOKENS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def merge(model: Any) -> None:
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        if isinstance(module, LowRank):
            module.base.weight = nn.Parameter(module.merged().detach())
            module.up.data.zero_()


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("which", ["head", "table", "both"])
@pytest.mark.parametrize("top_k", [None, 5])
def test_an_adapter_computes_and_learns_as_its_merged_weights_do(
    architecture: str, which: str, top_k: int | None
) -> None:
    fields = {"pondering_top_k": top_k, "pondering_temperature": 0.8, "tie_word_embeddings": False}
    model = make_confident(architecture, pondering_steps=2, scale_embeds=True, **fields).double()
    before = model(TOKENS).logits
    adapters = adapt(model, which)
    got = model(TOKENS, labels=TOKENS, z_loss=0.01, track=10**6)
    got.loss.backward()
    assert (got.logits - before).norm() > 0.05 * before.norm()

    plain = copy.deepcopy(model)
    merge(plain)
    for name in ("lm_head", *(key for key, m in plain.base_model.named_children() if isinstance(m, LowRank))):
        owner = plain if name == "lm_head" else plain.base_model
        if isinstance(getattr(owner, name), LowRank):
            setattr(owner, name, getattr(owner, name).base)
    expected = plain(TOKENS, labels=TOKENS, z_loss=0.01, track=10**6)
    for key in ("logits", "loss", "pass_losses", "pass_entropies", "z_loss"):
        torch.testing.assert_close(got[key], expected[key], atol=1e-9, rtol=1e-9)
    for ours, truth in zip(got.changes, expected.changes, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.logits, by_the_equations(plain, TOKENS), atol=1e-9, rtol=1e-9)

    plain.zero_grad()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    plain(TOKENS, labels=TOKENS, z_loss=0.01).loss.backward()
    weights = {"head": plain.get_output_embeddings().weight, "table": plain.get_input_embeddings().weight}
    for adapter in adapters:
        gradient = weights["table" if isinstance(adapter.base, nn.Embedding) else "head"].grad
        torch.testing.assert_close(adapter.up.grad, gradient @ adapter.down.t(), atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(adapter.down.grad, adapter.up.t() @ gradient, atol=1e-9, rtol=1e-7)


def _double(module: Any, _given: Any, result: Any) -> Any:
    return result * 1.5


HOOKS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a forward hook on the head": (
        lambda m: m.get_output_embeddings().register_forward_hook(_double),
        lambda m: m.get_output_embeddings().weight.mul_(1.5),
    ),
    "a forward hook on the table": (
        lambda m: m.get_input_embeddings().register_forward_hook(_double),
        lambda m: m.get_input_embeddings().weight.mul_(1.5),
    ),
    "a pre-hook on the head": (
        lambda m: m.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0] * 1.5,)),
        lambda m: m.get_output_embeddings().weight.mul_(1.5),
    ),
    "a pre-hook on the table": (
        lambda m: m.get_input_embeddings().register_forward_pre_hook(lambda _, given: ((given[0] + 1) % VOCABULARY,)),
        lambda m: m.get_input_embeddings().weight.copy_(m.get_input_embeddings().weight.roll(-1, 0)),
    ),
    "another forward on the head": (
        lambda m: setattr(m.lm_head, "forward", lambda h: 1.5 * nn.functional.linear(h, m.lm_head.weight)),
        lambda m: m.get_output_embeddings().weight.mul_(1.5),
    ),
    "a parametrized head": (
        lambda m: nn.utils.parametrize.register_parametrization(m.lm_head, "weight", _Larger()),
        lambda m: m.get_output_embeddings().weight.mul_(1.5),
    ),
}


class _Larger(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


@pytest.mark.parametrize("what", HOOKS)
def test_whatever_sits_on_a_module_acts_in_every_pass(what: str) -> None:
    put, equivalent = HOOKS[what]
    model, plain = (make_confident("llama", pondering_steps=2, scale_embeds=True).double() for _ in range(2))
    put(model)
    with torch.no_grad():
        equivalent(plain)
        got, expected = model(TOKENS, labels=TOKENS), plain(TOKENS, labels=TOKENS)
    for key in ("logits", "loss", "pass_losses", "pass_entropies"):
        torch.testing.assert_close(got[key], expected[key], atol=1e-9, rtol=1e-9)


def test_a_head_with_a_bias_ponders_with_it() -> None:
    model = make_confident("llama", pondering_steps=2).double()
    biased = nn.Linear(32, VOCABULARY).double()
    with torch.no_grad():
        biased.weight.copy_(model.lm_head.weight)
    model.lm_head = biased
    e = model.get_input_embeddings()(TOKENS)
    with torch.no_grad():
        for _ in range(2):
            p = biased(model.base_model.one_pass(e).last_hidden_state).softmax(-1)
            e = e + p @ model.get_input_embeddings().weight
        expected = biased(model.base_model.one_pass(e).last_hidden_state)
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-9, rtol=1e-9)


def test_plain_modules_keep_the_fused_path() -> None:
    model = make_confident("llama", pondering_steps=1)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert is_plain(head, nn.Linear) and is_plain(table, nn.Embedding)
    model.enable_input_require_grads()  # of transformers; it changes nothing that the table says
    assert is_plain(table, nn.Embedding)
    assert not is_plain(nn.Embedding(4, 2, max_norm=1.0), nn.Embedding)
    assert not is_plain(nn.Embedding(4, 2, sparse=True), nn.Embedding)
    assert not is_plain(nn.Linear(4, 2, bias=False, device="meta"), nn.Linear)
    handle = head.register_full_backward_hook(lambda *_: None)
    assert not is_plain(head, nn.Linear)
    handle.remove()
    assert is_plain(head, nn.Linear)


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_weights_that_wait_elsewhere_are_brought_back(architecture: str, way: str, tmp_path: Path) -> None:
    model = make_confident(architecture, pondering_steps=2, scale_embeds=True)
    with torch.no_grad():
        expected = model(TOKENS, labels=TOKENS)
        if way == "cpu_offload":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert model.get_output_embeddings().weight.device.type == "meta"
        got = model(TOKENS, labels=TOKENS)
        hidden = model.base_model(input_ids=TOKENS).last_hidden_state
        through_head = model.get_output_embeddings()(hidden)
    for key in ("logits", "loss", "pass_losses", "pass_entropies"):
        torch.testing.assert_close(got[key], expected[key], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(through_head, expected.logits, atol=2e-5, rtol=1e-5)


def test_a_quantized_head_says_what_it_would_when_called() -> None:
    model = make_confident("llama", pondering_steps=2)
    with torch.no_grad():
        close = model(TOKENS).logits
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        got = quantized(TOKENS).logits
        e = quantized.get_input_embeddings()(TOKENS)
        for _ in range(2):
            p = quantized.lm_head(quantized.base_model.one_pass(e).last_hidden_state).softmax(-1)
            e = e + p @ model.get_input_embeddings().weight
        expected = quantized.lm_head(quantized.base_model.one_pass(e).last_hidden_state)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(got, close)


def test_modules_without_data_or_with_another_vocabulary_are_refused() -> None:
    model = make_confident("llama", pondering_steps=1)
    readout, hidden = Readout(model), torch.randn(2, 9, 32)
    model.lm_head = nn.Linear(32, VOCABULARY, bias=False, device="meta")
    model.lm_head.forward = lambda h: h.new_empty(*h.shape[:-1], VOCABULARY, device="meta")
    with pytest.raises(ValueError, match=r"the head \(Linear\) gives a tensor without data"):
        Readout(model).pondering_embedding(hidden, None)
    with pytest.raises(ValueError, match=r"the head \(Linear\) gives a tensor without data"):
        Readout(model).cross_entropy(hidden, TOKENS)
    model.lm_head = nn.Sequential(nn.Linear(32, VOCABULARY + 1))
    with pytest.raises(ValueError, match=r"gives 62 logits for a vocabulary of 61 tokens"):
        Readout(model).pondering_embedding(hidden, None)
    with pytest.raises(ValueError, match="label 61 is not a token"):
        readout.cross_entropy(hidden, torch.full_like(TOKENS, VOCABULARY))


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_a_module_that_is_called_never_makes_tokens_times_vocabulary() -> None:
    tokens, vocabulary = 160, 2**16
    model = make_confident("llama", pondering_steps=1, vocab_size=vocabulary, max_position_embeddings=256)
    adapt(model, "head")
    given = torch.randint(0, vocabulary, (1, tokens))
    with Largest() as largest:
        model(given, labels=given, skip_logits=True).loss.backward()
    assert largest.elements <= 2**22 < tokens * vocabulary
