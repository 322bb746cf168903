"""Drafts of the extra heads: the text is that of plain decoding, whatever was accepted, and the cache is cropped."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from ponder_scale.model.modeling import CACHE_NAME
from tests.model.architectures import TINY, VOCABULARY, make

HEADS, NEW = 3, 24


def rows(number: int, seed: int) -> torch.Tensor:
    """Tokens that follow a rule, but for one in six, which is drawn."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(VOCABULARY, (number, 33), generator=generator)
    kept = torch.rand(found.shape, generator=generator) > 1 / 6
    for place in range(1, 33):
        found[:, place] = torch.where(kept[:, place], (3 * found[:, place - 1] + 1) % VOCABULARY, found[:, place])
    return found


@cache
def trained(architecture: str, steps: int = 1) -> Any:
    """A model whose heads have learned, but for the last one, so that some drafts are accepted and some are not."""
    model = make(architecture, extra_heads=HEADS, pondering_steps=steps, scale_embeds=True).train()
    fresh = copy.deepcopy(model.extra_heads[-1].state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(30):
        tokens = rows(8, step)
        model(tokens, labels=tokens, multi_token_weight=1.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.extra_heads[-1].load_state_dict(fresh)
    return model.eval()


def generate(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


@pytest.mark.parametrize("architecture", TINY)
def test_greedy_text_is_that_of_plain_decoding(architecture: str) -> None:
    model = trained(architecture)
    drafts = model.draft_heads()
    forwards = 0

    def counted(run_pass: Any, embeds: torch.Tensor, index: int, *arguments: Any, **options: Any) -> Any:
        nonlocal forwards
        forwards += index == 0
        return run_pass(embeds, index, *arguments, **options)

    prompts = rows(3, 99)[:, :6].split(1)
    for prompt in prompts:
        plain = generate(model, prompt)
        model.wrappers = (counted,)
        assert torch.equal(generate(model, prompt, custom_generate=drafts), plain)
        model.wrappers = ()
    assert 0 < drafts.accepted < drafts.proposed, "nothing to see"
    # each forward gives one token of its own, but for a last one that a draft makes unnecessary
    assert 0 <= forwards + drafts.accepted - NEW * len(prompts) <= len(prompts)


def test_the_draft_is_what_the_heads_say_at_the_last_token_that_was_kept() -> None:
    """Counted without a cache along the plain text. A draft of another token would only be accepted less often."""
    model, drafts, proposed, accepted = trained("llama"), trained("llama").draft_heads(), 0, 0
    for prompt in rows(3, 91)[:, :6].split(1):
        text = generate(model, prompt)
        assert torch.equal(generate(model, prompt, custom_generate=drafts), text)
        known, whole = prompt.shape[1] + 1, text.shape[1]
        while known < whole:
            with torch.no_grad():  # the last known token has not been read
                ahead = model(text[:, : known - 1], extra_logits=True).extra_logits[:, 0, -1].argmax(-1)
            ahead = ahead[: whole - known - 1].tolist()
            same = 0
            while same < len(ahead) and ahead[same] == text[0, known + same]:
                same += 1
            proposed, accepted, known = proposed + len(ahead), accepted + same, known + same + 1
    assert (drafts.proposed, drafts.accepted) == (proposed, accepted)


@pytest.mark.parametrize(
    "options",
    [
        {"pondering_steps": 0},
        {"pondering_steps": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"min_new_tokens": 9, "eos_token_id": [*range(30)]},
    ],
    ids=str,
)
def test_it_ends_and_is_steered_as_plain_decoding_is(options: dict[str, Any]) -> None:
    model = trained("llama")
    for prompt in rows(3, 98)[:, :5].split(1):
        assert torch.equal(
            generate(model, prompt, custom_generate=model.draft_heads(), **options), generate(model, prompt, **options)
        )


def test_an_end_token_within_a_draft_ends_the_text() -> None:
    model = trained("llama")
    prompt = rows(1, 97)[:, :6]
    plain = generate(model, prompt)[0, 6:].tolist()
    for end in set(plain):
        drafted = generate(model, prompt, custom_generate=model.draft_heads(), eos_token_id=end)[0, 6:].tolist()
        assert drafted == plain[: plain.index(end) + 1]


@pytest.mark.parametrize("steps", [0, 2])
def test_every_layer_of_the_cache_holds_what_was_read_of_the_text_and_goes_on(steps: int) -> None:
    model, prompt = trained("gpt_neox", steps), rows(1, 96)[:, :6]
    kept, drafts = DynamicCache(), model.draft_heads()
    text = generate(model, prompt, custom_generate=drafts, **{CACHE_NAME: kept})
    assert drafts.proposed > drafts.accepted
    assert len(kept.layers) == (steps + 1) * model.num_layers + HEADS
    assert {layer.get_seq_length() for layer in kept.layers} == {text.shape[1] - 1}
    whole = DynamicCache()
    with torch.no_grad():
        model(text[:, :-1], past_key_values=whole, extra_logits=True)
        for layer, expected in zip(kept.layers, whole.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, expected.values, atol=1e-4, rtol=1e-4)
    longer = generate(model, text, custom_generate=drafts, max_new_tokens=5, **{CACHE_NAME: kept})
    assert torch.equal(longer, generate(model, prompt, max_new_tokens=NEW + 5))


def test_a_cache_without_the_heads_or_of_other_steps_is_refused() -> None:
    model, prompt = trained("llama"), rows(1, 95)[:, :6]
    with torch.no_grad():
        for first, then in (
            ({}, {"extra_logits": True}),
            ({"extra_logits": True}, {"pondering_steps": 2}),
            ({"extra_logits": True}, {"extra_logits": True, "pondering_steps": 0}),
        ):
            kept = DynamicCache()
            model(prompt, past_key_values=kept, **first)
            with pytest.raises(
                ValueError, match="the cache was filled without the extra heads, or with them and anoth"
            ):
                model(prompt[:, :1], past_key_values=kept, **then)
        kept = DynamicCache()
        model(prompt, past_key_values=kept, extra_logits=True)
        again = model(prompt[:, :1], past_key_values=kept).logits
        whole = model(torch.cat([prompt, prompt[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)


def test_sampled_text_has_the_distribution_of_the_model() -> None:
    """Of the first two tokens, two candidates each: 200 draws against the exact probabilities, within 4 deviations."""
    model, prompt, draws = trained("llama"), rows(1, 94)[:, :6], 200
    options = {"do_sample": True, "top_k": 2, "temperature": 2.0, "max_new_tokens": 3}
    with torch.no_grad():
        first = (model(prompt).logits[0, -1] / 2).topk(2)
        expected = {}
        for p, token in zip(first.values.softmax(-1).tolist(), first.indices, strict=True):
            then = (model(torch.cat([prompt, token.view(1, 1)], 1)).logits[0, -1] / 2).topk(2)
            for q, second in zip(then.values.softmax(-1).tolist(), then.indices.tolist(), strict=True):
                expected[token.item(), second] = p * q
    torch.manual_seed(0)
    drafts, found = model.draft_heads(), Counter[tuple[int, ...]]()
    for _ in range(draws):
        found[tuple(generate(model, prompt, custom_generate=drafts, **options)[0, 6:8].tolist())] += 1
    assert 0 < drafts.accepted < drafts.proposed
    assert found.keys() <= expected.keys() and len(expected) == 4
    for pair, p in expected.items():
        assert abs(found[pair] - draws * p) < 4 * (draws * p * (1 - p)) ** 0.5 + 1, (pair, found, expected)


def test_a_streamer_gets_the_prompt_and_each_token() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    streamer, model = Streamer(), trained("llama")
    text = generate(model, rows(1, 93)[:, :6], custom_generate=model.draft_heads(streamer))
    assert streamer.got == text[0].tolist() and streamer.ended == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exit_kl": 0.1}, "exit_kl, because the heads read the last pass"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "a batch of 2 sequences"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"position_ids": torch.arange(3, 9).view(1, -1)}, "position_ids of your own"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "padding"),
        ({"track": 4}, "track"),
        ({"cache_implementation": "static"}, "needs a cache of DynamicLayer, found StaticLayer"),
        ({"use_cache": False}, "needs a cache of DynamicLayer, found none"),
    ],
    ids=str,
)
def test_what_it_does_not_do_is_refused(options: dict[str, Any], said: str) -> None:
    model, prompt = trained("llama"), rows(1, 92)[:, :6]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "pad_token_id": 0, **options}
    with pytest.raises(ValueError, match=said):
        model.generate(prompt, custom_generate=model.draft_heads(), **options)


def test_a_model_without_heads_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"this model has no extra_heads to draft with; use assistant_model=model\.draft"
    ):
        make(pondering_steps=1).draft_heads()
