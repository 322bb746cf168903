"""A pondering model in other people's hands: its backbone, its arguments, its configuration, its checkpointing."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig

from ponder_scale.export.folder import write_folder
from tests.model.architectures import LAYERS, TINY, VOCABULARY, make, make_confident

TOKENS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
ARCHITECTURES = pytest.mark.parametrize("architecture", TINY)


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> Any:
    return make_confident(request.param, pondering_steps=2, scale_embeds=True, initial_scale=2.0)


def exported(folder: Path, architecture: str = "llama", **fields: Any) -> Path:
    model = make_confident(architecture, pondering_steps=2, **fields)
    write_folder(folder, model.config, model.named_parameters(), dtype="float32", card=str, tokenizer=None)
    return folder


@ARCHITECTURES
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("feedback", "residual"), [("embedding", "accumulate"), ("embedding", "restart"), ("hidden", "replace")]
)
def test_whoever_calls_the_backbone_and_then_the_head_gets_the_models_logits(
    architecture: str, steps: int, feedback: str, residual: str
) -> None:
    fields = {"feedback": feedback, "residual": residual, "scale_embeds": True, "initial_scale": 2.0}
    model = make_confident(architecture, pondering_steps=steps, **fields).double()
    head = model.get_output_embeddings()
    with torch.no_grad():
        expected = model(TOKENS).logits
        hidden = model.base_model(input_ids=TOKENS).last_hidden_state
        embedded = model.base_model(inputs_embeds=model.get_input_embeddings()(TOKENS)).last_hidden_state
        plain = model.base_model.one_pass(model.get_input_embeddings()(TOKENS)).last_hidden_state
    assert torch.equal(head(hidden), expected) and torch.equal(embedded, hidden)
    assert torch.allclose(head(plain), expected) == (False if steps else not fields["scale_embeds"])


def test_the_backbone_takes_steps_caches_and_the_tuple(model: Any) -> None:
    backbone = model.base_model
    with torch.no_grad():
        whole = backbone(TOKENS).last_hidden_state
        output = backbone(TOKENS[:, :5], use_cache=True)
        cache = output.cache if hasattr(output, "cache") else output.past_key_values
        assert len(cache.layers) == 3 * LAYERS
        rest = backbone(TOKENS[:, 5:], past_key_values=cache).last_hidden_state
        torch.testing.assert_close(rest, whole[:, 5:], atol=1e-4, rtol=1e-4)
        fewer = backbone(TOKENS, pondering_steps=1, return_dict=False)
        assert torch.equal(model.get_output_embeddings()(fewer[0]), model(TOKENS, pondering_steps=1).logits)


def test_its_gradients_are_the_models(model: Any) -> None:
    gradients = []
    for by_hand in (False, True):
        model.zero_grad()
        if by_hand:
            logits = model.get_output_embeddings()(model.base_model(input_ids=TOKENS).last_hidden_state)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        else:
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, by_hand in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-3)


def test_copies_and_pickles_ponder_with_their_own_head() -> None:
    model = make_confident("llama", pondering_steps=2)
    expected = model(TOKENS).logits
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert other.base_model.causal is other and other.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(other(TOKENS).logits, expected)
        with torch.no_grad():
            other.lm_head.weight.mul_(2.0)
        hidden = other.base_model(input_ids=TOKENS).last_hidden_state
        assert torch.equal(other.lm_head(hidden), other(TOKENS).logits) and torch.equal(model(TOKENS).logits, expected)
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model.base_model(TOKENS).last_hidden_state.shape == (2, 9, 32) and model(TOKENS).logits.shape[-1] == 64


def test_a_backbone_is_not_built_alone(tmp_path: Path) -> None:
    folder = exported(tmp_path / "folder")
    for load in (
        lambda: AutoModel.from_pretrained(folder, trust_remote_code=True),
        lambda: AutoModel.from_config(make("llama").config),
        lambda: type(make("llama").base_model)(make("llama").config),
    ):
        with pytest.raises(ValueError, match=r"cannot be built alone|Unrecognized configuration class"):
            load()
    with pytest.raises(ValueError, match="load the folder with AutoModelForCausalLM and take its base_model"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


LENGTHS = (4, 1, 6)  # of the documents in a row


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_in_one_row_are_as_if_each_were_alone(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    tokens = TOKENS.reshape(1, -1)[:, : sum(LENGTHS)]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    said = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    said["seq_idx"] = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    with torch.no_grad():
        expected = torch.cat([model(part).logits for part in tokens.split(LENGTHS, 1)], 1)
        for options in ({}, said, {"use_cache": False}):
            found = model(tokens, position_ids=positions, **options).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        joined = model(tokens).logits
        assert (joined - expected).abs().max() > 1e-2
        for name, value in said.items():
            with pytest.raises(ValueError, match=f"only flash attention obeys {name} without position_ids"):
                model(tokens, **{name: value})
        for given, options in (
            ("a cache", {"use_cache": True}),
            ("a cache", {"past_key_values": DynamicCache()}),
            (r"an attention_mask of \(B, T\)", {"attention_mask": torch.ones_like(tokens)}),
        ):
            with pytest.raises(ValueError, match=f"several documents, but with {given} transformers does not separate"):
                model(tokens, position_ids=positions, **options)


def test_positions_of_padding_are_no_documents(model: Any) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    mask[1, 7:] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        found = model(TOKENS, attention_mask=mask, position_ids=positions, use_cache=True).logits
        alone = model(TOKENS[:1, 3:]).logits
    torch.testing.assert_close(found[:1, 3:], alone, atol=1e-4, rtol=1e-4)


@ARCHITECTURES
def test_positions_mean_what_they_do_in_the_stock_class(architecture: str) -> None:
    tiny = TINY[architecture]
    stock = tiny.stock_model(tiny.stock_configuration(**tiny.shape)).eval()
    ours = make(architecture, pondering_steps=0).eval()
    ours.load_state_dict(stock.state_dict())
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    given = (TOKENS, None, mask) if architecture == "gpt2" else (TOKENS, mask)
    for a, b in ((ours, stock), (ours.base_model, stock.base_model)):
        assert torch.equal(a(*given)[0], b(*given)[0])
    with pytest.raises(TypeError, match="attention_mask was given twice"):
        ours(*given, attention_mask=mask)


@pytest.mark.parametrize("name", ["foo", "pondering_step", "layer_past", "token_type_idz"])
def test_an_argument_that_nobody_knows_is_refused(model: Any, name: str) -> None:
    for callee in (model, model.base_model):
        with pytest.raises(TypeError, match=f"{name} is an argument that neither"):
            callee(TOKENS, **{name: 1})
        with pytest.raises(TypeError, match=f"{name} is a cache; give it under the name past_key_values or cache"):
            callee(TOKENS, **{name: DynamicCache()})
        callee(TOKENS, **{name: None})
    with pytest.raises(TypeError, match="labels is an argument"):
        model.base_model(TOKENS, labels=TOKENS)


def test_both_names_of_the_cache_are_taken(model: Any) -> None:
    with torch.no_grad():
        whole = model(TOKENS).logits
        for name in ("past_key_values", "cache"):
            cache = DynamicCache()
            model(TOKENS[:, :5], **{name: cache})
            got = model(TOKENS[:, 5:], **{name: cache}).logits
            torch.testing.assert_close(got, whole[:, 5:], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="names of one argument, but two caches were given"):
        model(TOKENS, past_key_values=DynamicCache(), cache=DynamicCache())
    with pytest.raises(TypeError, match="the cache is a tuple; give a Cache"):
        model(TOKENS, past_key_values=((TOKENS, TOKENS),))


@ARCHITECTURES
def test_without_a_dictionary_the_output_is_the_stock_tuple(architecture: str) -> None:
    tiny = TINY[architecture]
    stock = tiny.stock_model(tiny.stock_configuration(**tiny.shape)).eval()
    ours = make(architecture, pondering_steps=0).eval()
    ours.load_state_dict(stock.state_dict())
    for options in ({}, {"labels": TOKENS}, {"use_cache": True}, {"output_hidden_states": True, "labels": TOKENS}):
        expected = stock(TOKENS, **{"use_cache": False, **options}, return_dict=False)
        ours.config.return_dict = True
        called = ours(TOKENS, **options, return_dict=False)
        ours.config.return_dict = False
        configured = ours(TOKENS, **options)
        for got in (called, configured):
            assert isinstance(got, tuple) and [type(part) for part in got] == [type(part) for part in expected]
            for part, truth in zip(got, expected, strict=True):
                if isinstance(part, torch.Tensor):
                    torch.testing.assert_close(part, truth)
    ponders = make(architecture, pondering_steps=2).eval()
    ponders.config.return_dict = False
    assert torch.equal(ponders(TOKENS)[0], ponders(TOKENS, return_dict=True).logits)
    assert torch.equal(ponders.generate(TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=0)[:, :9], TOKENS)


@ARCHITECTURES
def test_a_second_post_init_leaves_the_weights_alone(architecture: str, tmp_path: Path) -> None:
    fresh = make(architecture, pondering_steps=2)
    fresh.save_pretrained(tmp_path)
    loaded = TINY[architecture].model.from_pretrained(tmp_path)
    before = copy.deepcopy(fresh.state_dict())
    for model in (fresh, loaded):
        model.post_init()
        model.base_model.post_init()
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual", "acumulate"),
        ("feedback", "hiden"),
        ("pondering_temperature", -1),
        ("pondering_temperature", float("nan")),
        ("pondering_top_k", 0),
        ("pondering_top_k", 2.5),
        ("pondering_steps", -1),
        ("pondering_steps", True),
        ("initial_scale", float("inf")),
        ("scale_embeds", "yes"),
    ],
)
def test_a_field_is_checked_at_load_and_at_call(field: str, value: Any, tmp_path: Path) -> None:
    folder = exported(tmp_path / "folder")
    with pytest.raises(ValueError, match=f"{field} is {value!r}; expected"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **{field: value})
    model = make("llama")
    setattr(model.config, field, value)
    for callee in (model, model.base_model):
        with pytest.raises(ValueError, match=f"{field} is {value!r}; expected"):
            callee(TOKENS)


def test_a_loss_function_that_would_not_be_called_is_refused() -> None:
    model = make("llama", pondering_steps=1)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(ValueError, match="loss_function was set on this model, which never calls it"):
        model(TOKENS, labels=TOKENS)
    assert model(TOKENS).logits.shape == (2, 9, VOCABULARY)


def test_a_generation_config_can_say_the_pondering_steps(model: Any) -> None:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(TOKENS)
    zero, one, two = (
        model.generate(TOKENS, attention_mask=mask, pondering_steps=steps, **options) for steps in range(3)
    )
    if model.config.model_type == "ponder_llama":  # others say the same at this size
        assert not torch.equal(one, two) and not torch.equal(zero, one)
    said = GenerationConfig(pondering_steps=1, **options)
    assert torch.equal(model.generate(TOKENS, attention_mask=mask, generation_config=said), one)
    assert torch.equal(model.generate(TOKENS, attention_mask=mask, generation_config=said, pondering_steps=2), two)
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(pondering_steps=1)
        assert torch.equal(model.generate(TOKENS, attention_mask=mask, **options), one)
        assert torch.equal(model.draft(0).generate(TOKENS, attention_mask=mask, **options), zero)
    finally:
        model.generation_config = own


def test_a_draft_of_fewer_layers_changes_no_token(model: Any) -> None:
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": VOCABULARY - 1, "attention_mask": torch.ones_like(TOKENS[:1])}
    plain = model.generate(TOKENS[:1], **options)
    assert torch.equal(model.generate(TOKENS[:1], assistant_early_exit=1, **options), plain)
    assert torch.equal(model.generate(TOKENS[:1], **options), plain)  # the draft's setting is gone again


def _note(calls: list[Any], module: Any, _given: Any) -> None:
    calls.append(module)


def test_checkpointing_of_transformers_is_never_reentrant(model: Any) -> None:
    for callee in (model, model.base_model):
        for switch in (
            lambda m: m.gradient_checkpointing_enable({"use_reentrant": True}),
            lambda m: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True}),
            lambda m: m._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpoint),
            lambda m: m._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True)),
        ):
            with pytest.raises(ValueError, match="use_reentrant=True silently loses the gradients of all but one pass"):
                switch(callee)
    gradients = []
    for enabled in (False, True):
        model.train()
        model.zero_grad()
        if enabled:
            model.gradient_checkpointing_enable()
        calls: list[Any] = []
        handle = next(model.layers[0].children()).register_forward_pre_hook(partial(_note, calls))
        model(TOKENS, labels=TOKENS).loss.backward()
        handle.remove()
        assert len(calls) == (6 if enabled else 3)  # again in backward, in each of three passes
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    model.gradient_checkpointing_disable()
    model.eval()
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
