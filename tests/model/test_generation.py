"""Generation with the cache of S + 1 passes equals generation without, token for token."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, LlamaForCausalLM, StaticCache

from tests.model.architectures import LAYERS, TINY, VOCABULARY, make_confident
from tests.model.inside import Inside

PROMPT = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))


def generate(model: Any, prompt: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(prompt) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **options}
    return model.generate(prompt, attention_mask=mask, **options)


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> Any:
    return make_confident(request.param, pondering_steps=3, scale_embeds=True)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_confident("llama", pondering_steps=3, scale_embeds=True)


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("feedback", "residual"), [("embedding", "accumulate"), ("embedding", "restart"), ("hidden", "replace")]
)
def test_step_by_step_logits_equal_the_full_forward(
    architecture: str, implementation: str, feedback: str, residual: str
) -> None:
    fields = {"scale_embeds": True, "attn_implementation": implementation, "feedback": feedback, "residual": residual}
    model = make_confident(architecture, pondering_steps=3, **fields).double()
    with torch.no_grad():
        full = model(PROMPT).logits
        cache, parts = DynamicCache(config=model.config), []
        for piece in (PROMPT[:, :4], PROMPT[:, 4:5], PROMPT[:, 5:]):
            parts.append(model(piece, past_key_values=cache).logits)
    assert len(cache.layers) == 4 * LAYERS
    # eager attention of transformers takes its softmax in fp32
    tolerance = 1e-9 if implementation == "sdpa" else 1e-4
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("steps", [None, 0, 1, 5])
def test_greedy_with_cache_equals_greedy_without(model: Any, steps: int | None) -> None:
    options = {} if steps is None else {"pondering_steps": steps}
    cached = generate(model, PROMPT, **options)
    assert torch.equal(cached, generate(model, PROMPT, use_cache=False, **options))
    assert cached.shape == (2, 21)


def test_a_left_padded_batch_gives_what_each_row_gives_alone(model: Any) -> None:
    short = PROMPT[1:, 3:]
    padded = torch.cat([PROMPT[:1], torch.nn.functional.pad(short, (3, 0))])
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    for use_cache in (True, False):
        together = generate(model, padded, mask, use_cache=use_cache)
        assert torch.equal(together[0, 9:], generate(model, PROMPT[:1])[0, 9:])
        assert torch.equal(together[1, 9:], generate(model, short)[0, 6:])


def test_beam_search_reorders_every_pass(model: Any) -> None:
    assert torch.equal(generate(model, PROMPT, num_beams=3), generate(model, PROMPT, num_beams=3, use_cache=False))


def test_a_cache_of_another_number_of_steps_is_refused(llama: Any) -> None:
    with torch.no_grad():
        for first, then in ((1, 3), (3, 4)):
            cache = DynamicCache()
            llama(PROMPT, past_key_values=cache, pondering_steps=first)
            with pytest.raises(ValueError, match="continue with the pondering_steps it was filled with"):
                llama(PROMPT[:, :1], past_key_values=cache, pondering_steps=then)


def test_fewer_steps_can_go_on_from_a_cache_of_more(llama: Any) -> None:
    with torch.no_grad():
        cache = DynamicCache()
        llama(PROMPT[:, :6], past_key_values=cache)
        got = llama(PROMPT[:, 6:], past_key_values=cache, pondering_steps=1).logits
        torch.testing.assert_close(got, llama(PROMPT, pondering_steps=1).logits[:, 6:], atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="holds 9 tokens for the first pass and 6 for pass 4"):
            llama(PROMPT[:, :1], past_key_values=cache)


def test_a_plain_forward_builds_no_cache(llama: Any) -> None:
    with torch.no_grad():
        assert llama(PROMPT).past_key_values is None
        assert llama(PROMPT, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("entry", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_at_every_entry(llama: Any, entry: str) -> None:
    assert hasattr(LlamaForCausalLM, entry)  # it is the name of a way in, in this version of transformers
    with pytest.raises(ValueError, match="silently wrong for a pondering model"):
        getattr(llama, entry)([[1, 2, 3]])


def test_no_other_entry_to_continuous_batching_is_known() -> None:
    from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

    entries = {name for name in vars(ContinuousMixin) if not name.startswith("_") and "destroy" not in name}
    assert entries == {"generate_batch", "init_continuous_batching", "continuous_batching_context_manager"}


def test_sampling_draws_the_same_with_the_cache_as_without(model: Any) -> None:
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(generate(model, PROMPT, do_sample=True, num_return_sequences=2, use_cache=use_cache))
    assert torch.equal(*drawn) and drawn[0].shape[0] == 4


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY - 1},
        {"cache_implementation": "dynamic", "num_beams": 2, "do_sample": False, "length_penalty": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_way_to_decode_gives_the_tokens_of_plain_decoding(model: Any, options: dict[str, Any]) -> None:
    prompt = PROMPT[:1] if "prompt_lookup_num_tokens" in options else PROMPT
    kept = {key: options[key] for key in ("num_beams", "length_penalty", "eos_token_id") if key in options}
    plain = generate(model, prompt, use_cache=False, **kept)
    # min_new_tokens forbids the end token, so both run to the same length
    assert torch.equal(generate(model, prompt, **options), plain)


def test_a_static_cache_takes_left_padding(model: Any) -> None:
    mask = torch.ones_like(PROMPT)
    mask[1, :3] = 0
    assert torch.equal(
        generate(model, PROMPT, mask, cache_implementation="static"), generate(model, PROMPT, mask, use_cache=False)
    )


def compiling(backend: str) -> CompileConfig:
    """Lets `generate` compile on a CPU too, in one graph or not at all."""
    made = CompileConfig(fullgraph=True, backend=backend, mode=None)
    made._compile_all_devices = True
    return made


@pytest.mark.slow  # the compiler works
@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("pondering_steps", [0, 1, 3])
def test_generation_compiles_one_step_and_gives_the_greedy_tokens(architecture: str, pondering_steps: int) -> None:
    model = make_confident(architecture, pondering_steps=pondering_steps, num_hidden_layers=1)
    mask = torch.ones_like(PROMPT)
    mask[1, :3] = 0
    torch._dynamo.reset()
    counters.clear()
    options = {"cache_implementation": "static", "compile_config": compiling("eager")}
    expected = generate(model, PROMPT, mask)
    for _ in range(2):  # the second time with caches of its own
        assert torch.equal(generate(model, PROMPT, mask, **options), expected)
    # 22 tokens at as many positions, by one graph
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=str)
def test_the_static_caches_of_all_passes_stay_where_a_graph_was_captured(options: dict[str, Any]) -> None:
    model = make_confident("llama", pondering_steps=2)
    options |= {"cache_implementation": "static", "return_dict_in_generate": True}
    cache = generate(model, PROMPT, **options).past_key_values
    assert len(cache.layers) == 3 * LAYERS
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            assert hasattr(tensor, "_dynamo_static_input_type")  # or a CUDA graph would copy it at every token
    assert len({layer.keys.data_ptr() for layer in cache.layers}) == 3 * LAYERS


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.slow
def test_inductor_compiles_a_decoding_step_once() -> None:
    model = make_confident("llama", pondering_steps=1, scale_embeds=True, num_hidden_layers=1)
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, dynamic=False, fullgraph=True)
    with torch.no_grad():
        model(PROMPT[:, :6], past_key_values=cache)
        for position in range(6, 9):
            with torch._dynamo.config.patch(error_on_recompile=position > 7):  # the cache counts in tensors
                got = compiled(PROMPT[:, position : position + 1], past_key_values=cache).logits
            expected = model(PROMPT[:, : position + 1]).logits[:, -1:]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("draft_steps", [0, 1, 3])
def test_a_draft_of_fewer_steps_changes_no_token(model: Any, draft_steps: int) -> None:
    # assisted decoding of transformers takes one row, and an end token that min_new_tokens then forbids
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "eos_token_id": VOCABULARY - 1}
    calls = Counter()
    run_pass = model.run_pass

    def count(embeds: torch.Tensor, index: int, *arguments: Any, **keywords: Any) -> Any:
        calls[index] += 1
        return run_pass(embeds, index, *arguments, **keywords)

    draft = model.draft(draft_steps)
    model.run_pass = count
    try:
        assisted = generate(model, PROMPT[:1], assistant_model=draft, **options)
    finally:
        del model.run_pass
    assert torch.equal(assisted, generate(model, PROMPT[:1], **options))
    assert model.config.pondering_steps == 3 and draft.get_input_embeddings() is model.get_input_embeddings()
    assert calls[3] == calls[0] and (draft_steps != 3 or calls[3] < 12)  # a perfect draft saves most forwards


def test_generation_goes_on_from_a_returned_cache(model: Any) -> None:
    first = generate(model, PROMPT, return_dict_in_generate=True, max_new_tokens=5, min_new_tokens=5)
    more = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=7, min_new_tokens=7)
    assert torch.equal(more, generate(model, PROMPT))


def test_generation_starts_from_embeddings(model: Any) -> None:
    embeds = model.get_input_embeddings()(PROMPT)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    got = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(PROMPT), **options)
    assert torch.equal(got, generate(model, PROMPT)[:, 9:15])


def test_prefill_never_holds_tokens_times_vocabulary() -> None:
    tokens, vocabulary = 256, 2**16
    model = make_confident("llama", pondering_steps=1, vocab_size=vocabulary, max_position_embeddings=512)
    prompt = torch.randint(0, vocabulary, (1, tokens))
    with Inside() as inside:
        generate(model, prompt, max_new_tokens=2, min_new_tokens=2)
    assert vocabulary <= inside.largest <= 2**23 < tokens * vocabulary


def passes_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts, from here on, how often each pass runs on a single token."""
    calls: Counter[int] = Counter()
    run_pass = model.run_pass

    def count(embeds: torch.Tensor, index: int, *arguments: Any, **keywords: Any) -> Any:
        calls[index] += embeds.shape[1] == 1
        return run_pass(embeds, index, *arguments, **keywords)

    monkeypatch.setattr(model, "run_pass", count)
    return calls


def test_early_exit_saves_passes_and_at_zero_is_exact(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = generate(model, PROMPT)
    calls = passes_run(model, monkeypatch)
    assert torch.equal(generate(model, PROMPT, exit_kl=0.0), exact)
    assert calls[0] == calls[3] == 11  # the first of 12 tokens comes from the prompt
    calls.clear()
    assert generate(model, PROMPT, exit_kl=1e9).shape == exact.shape
    assert (calls[0], calls[1], calls[2]) == (11, 11, 0)


ROW_PRODUCT = torch.ops.aten._embedding_bag_per_sample_weights_backward  # of a few rows on a CPU


class HeadProducts(TorchDispatchMode):
    """Counts products with a column for each token of the vocabulary, and our own operators, which make them inside."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.count += found.shape[-1] == VOCABULARY
        self.count += function.namespace == "ponder_scale" or function.overloadpacket is ROW_PRODUCT
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("exit_kl", "passes"), [(0.0, 4), (1e9, 2)])
def test_early_exit_needs_one_product_of_the_head_for_each_pass(
    model: Any, exit_kl: float, passes: int, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        cache = model(PROMPT[:, :-1], use_cache=True).past_key_values
        expected = model(PROMPT[:, -1:], past_key_values=copy.deepcopy(cache), pondering_steps=passes - 1).logits
        with HeadProducts() as products:
            found = model(PROMPT[:, -1:], past_key_values=cache, exit_kl=exit_kl).logits
    assert products.count == passes
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_early_exit_is_the_pass_whose_prediction_settled(llama: Any) -> None:
    with torch.no_grad():
        cache = DynamicCache()
        llama(PROMPT[:, :-1], past_key_values=cache)
        beliefs = [llama(PROMPT, pondering_steps=steps).logits[:, -1].log_softmax(-1) for steps in range(4)]
        moved = [(b.exp() * (b - a)).sum(-1).max().item() for a, b in pairwise(beliefs)]
        first = moved[0]  # less than which a pass has to move for the forward to end
        for exit_kl in (1.01 * min(moved), 0.99 * first, 1.01 * first):
            settled = next((index + 1 for index, kl in enumerate(moved) if kl < exit_kl), 3)
            own = copy.deepcopy(cache)
            got = llama(PROMPT[:, -1:], past_key_values=own, exit_kl=exit_kl).logits[:, -1].log_softmax(-1)
            torch.testing.assert_close(got, beliefs[settled], atol=1e-4, rtol=1e-4)
        assert settled == 1 and (beliefs[1] - beliefs[2]).abs().max() > 1e-2
    assert {own.get_seq_length(index) for index in range(4 * LAYERS)} == {9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_kl": 0.1, "use_cache": False}, "exit_kl needs a cache of DynamicLayer, found none"),
        (
            {"exit_kl": 0.1, "cache_implementation": "static"},
            "exit_kl needs a cache of DynamicLayer, found StaticLayer",
        ),
        ({"pondering_steps": -1}, "pondering_steps is -1; expected an integer of at least 0"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(llama: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(llama, PROMPT, **options)
