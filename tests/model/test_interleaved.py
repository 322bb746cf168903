"""Pause tokens and latent thoughts, against loops over single positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from ponder_scale.model.interleaved import REFINEMENTS
from ponder_scale.setup.recompute import apply_recompute
from tests.model.architectures import TINY, VOCABULARY, make, make_confident
from tests.model.positions import by_jacobi, one_position_after_the_other

ARCHITECTURES = pytest.mark.parametrize("architecture", TINY)
FEEDBACKS = pytest.mark.parametrize("feedback", ["pause", "latent"])
LENGTH = 7
CLOSE = {"atol": 1e-9, "rtol": 1e-9}  # rotary embedding and norms round to fp32 in some architectures


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def interleaved(architecture: str = "llama", feedback: str = "latent", steps: int = 2, **fields: Any) -> Any:
    """A model in fp64 whose attention to the positions between tokens matters."""
    fields = {"scale_embeds": True, "initial_scale": 1.5, **fields}
    model = make(architecture, feedback=feedback, pondering_steps=steps, **fields).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("layers" in name or ".h." in name):
                parameter.mul_(3.0)
    return model


def gradients_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@ARCHITECTURES
@pytest.mark.parametrize(("feedback", "steps"), [("pause", 1), ("pause", 3), ("latent", 1), ("latent", 3)])
def test_logits_losses_and_gradients_are_those_of_the_published_iterations(
    architecture: str, feedback: str, steps: int, tokens: torch.Tensor
) -> None:
    model = interleaved(architecture, feedback, steps).train()
    asked = {} if feedback == "pause" else {"refinements": 2}
    output = model(tokens, labels=tokens, skip_logits=False, z_loss=1e-3, **asked)
    got = gradients_of(model, output.loss)
    said = one_position_after_the_other(model, tokens) if feedback == "pause" else by_jacobi(model, tokens, 2)
    torch.testing.assert_close(output.logits, said[-1], **CLOSE)
    wanted = tokens[:, 1:].flatten()
    losses = torch.stack([F.cross_entropy(each[:, :-1].flatten(0, 1), wanted) for each in said])
    torch.testing.assert_close(output.pass_losses.double(), losses.detach(), atol=1e-6, rtol=1e-6)
    assert losses.unique().numel() == steps + 1
    loss = losses[-1] + 1e-3 * said[-1, :, :-1].logsumexp(-1).square().mean()
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    expected = gradients_of(model, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=2e-7, rtol=1e-6, msg=name)
        assert gradient.abs().max() > 0, name


@ARCHITECTURES
@pytest.mark.parametrize("steps", [1, 2])
def test_refinements_of_every_latent_but_the_first_ones_are_exact_and_fewer_are_not(
    architecture: str, steps: int, tokens: torch.Tensor
) -> None:
    model = interleaved(architecture, "latent", steps).eval()
    with torch.no_grad():
        exact = one_position_after_the_other(model, tokens)[-1]
        torch.testing.assert_close(model(tokens, refinements=steps * (LENGTH - 1)).logits, exact, **CLOSE)
        published = model(tokens).logits
        assert torch.equal(published, model(tokens, refinements=REFINEMENTS).logits)
    known = (steps + REFINEMENTS) // steps  # tokens whose latents are exact by then
    torch.testing.assert_close(published[:, :known], exact[:, :known], **CLOSE)
    assert (published - exact).abs().max() > 1e-6


@ARCHITECTURES
@FEEDBACKS
def test_a_cache_gives_what_a_position_after_the_other_gives_however_the_text_is_cut(
    architecture: str, feedback: str, tokens: torch.Tensor
) -> None:
    model = interleaved(architecture, feedback, 2).eval()
    exact = one_position_after_the_other(model, tokens)
    for cut in ([1] * LENGTH, [LENGTH], [3, 1, 3], [1, 4, 2]):
        cache, said = DynamicCache(), []
        with torch.no_grad():
            for part in tokens.split(cut, 1):
                said.append(model(part, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(said, 1), exact[-1], **CLOSE)
        assert cache.get_seq_length() == LENGTH
    assert [layer.get_seq_length() for layer in cache.layers] == [LENGTH] * 3 * model.num_layers
    with torch.no_grad():
        one = model(tokens[:, :1], labels=tokens[:, :1], shift_labels=tokens[:, 1:2], use_cache=True, track=4)
    losses = F.cross_entropy(exact[:, :, 0].flatten(0, 1), tokens[:, 1].repeat(3), reduction="none").view(3, 2).mean(1)
    torch.testing.assert_close(one.pass_losses.double(), losses.detach(), atol=1e-6, rtol=1e-6)
    assert one.changes.embed_norms.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_latents_of_a_prompt_rest_after_a_few_passes_and_are_then_exact(dtype: torch.dtype) -> None:
    """In fp64 the iterations end when nothing changes, which is after the last of 40 latents at the latest."""
    prompt = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    model = make("llama", feedback="latent", pondering_steps=1, scale_embeds=True).eval()
    exact = model.double()(prompt, use_cache=True).logits
    runs: list[int] = []

    def counted(run_pass: Any, embeds: torch.Tensor, index: int, *arguments: Any, **options: Any) -> Any:
        runs.append(index)
        return run_pass(embeds, index, *arguments, **options)

    model.wrappers = (counted,)
    with torch.no_grad():
        found = model.to(dtype)(prompt, use_cache=True).logits
        assert len(runs) < 14
        plain = model(prompt, refinements=39).logits
    rounded = (plain.double() - exact).abs().max()
    assert (found.double() - exact).abs().max() < 2 * rounded


@ARCHITECTURES
@FEEDBACKS
def test_padding_on_the_left_and_several_documents_in_a_row_change_nothing(
    architecture: str, feedback: str, tokens: torch.Tensor
) -> None:
    model = interleaved(architecture, feedback, 2).eval()
    asked = {} if feedback == "pause" else {"refinements": 2 * LENGTH}
    with torch.no_grad():
        alone = [model(tokens[:1, :3], **asked).logits, model(tokens[:1, 3:], **asked).logits]
        packed = model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), **asked).logits
        torch.testing.assert_close(packed[:1], torch.cat(alone, 1), **CLOSE)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens[:1, 3:]], 1)
        mask = torch.tensor([[0] * 3 + [1] * 4])
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        torch.testing.assert_close(model(padded, **inputs, **asked).logits[:, 3:], alone[1], **CLOSE)
        cache = DynamicCache()
        for part in (slice(0, 5), slice(5, 6), slice(6, 7)):
            inputs = {
                "attention_mask": mask[:, : part.stop],
                "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, part],
            }
            said = model(padded[:, part], past_key_values=cache, **inputs).logits
        torch.testing.assert_close(said[:, -1], alone[1][:, -1], **CLOSE)


@ARCHITECTURES
@FEEDBACKS
def test_generation_beams_and_drafts_write_what_a_position_after_the_other_writes(
    architecture: str, feedback: str, tokens: torch.Tensor
) -> None:
    model = make_confident(architecture, feedback=feedback, pondering_steps=2)
    options = {"do_sample": False, "max_new_tokens": 5}
    text = tokens[:1, :4]
    for _ in range(5):
        text = torch.cat([text, one_position_after_the_other(model, text)[-1, :, -1].argmax(-1, keepdim=True)], 1)
    masked = {**options, "attention_mask": torch.ones_like(tokens[:1, :4])}
    assert torch.equal(model.generate(tokens[:1, :4], **masked), text)
    assert torch.equal(model.generate(tokens[:1, :4], assistant_model=model.draft(0), **masked), text)
    asked = {} if feedback == "pause" else {"refinements": 2 * 9}
    assert torch.equal(model.generate(tokens[:1, :4], use_cache=False, **asked, **masked), text)
    beams = [
        model.generate(tokens[:1, :4], num_beams=2, use_cache=cache, **(asked if not cache else {}), **masked)
        for cache in (True, False)
    ]
    assert torch.equal(*beams)


@ARCHITECTURES
@FEEDBACKS
def test_without_steps_it_is_the_stock_model_and_the_pause_gets_a_gradient_of_zero(
    architecture: str, feedback: str, tokens: torch.Tensor
) -> None:
    tiny = TINY[architecture]
    stock = tiny.stock_model(tiny.stock_configuration(**tiny.shape)).eval()
    ours = make(architecture, pondering_steps=0, feedback=feedback).eval()
    assert ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours(tokens).logits, stock(tokens).logits)
    model = interleaved(architecture, feedback)
    output = model(tokens, labels=tokens, pondering_steps=0)
    got = gradients_of(model, output.loss)
    assert output.pass_losses.shape == (1,)
    assert feedback == "latent" or got["pause_embedding.weight"].abs().max() == 0


@FEEDBACKS
@pytest.mark.parametrize("policy", ["selective", "layer", "pass", "pass+layer"])
def test_recomputation_changes_no_bit(feedback: str, policy: str, tokens: torch.Tensor) -> None:
    model = interleaved("llama", feedback)
    positions = torch.cat([torch.arange(3), torch.arange(4)]).expand(2, -1)
    plain = gradients_of(model, model(tokens, labels=tokens, position_ids=positions).loss)
    apply_recompute(model, policy)
    again = gradients_of(model, model(tokens, labels=tokens, position_ids=positions).loss)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


@FEEDBACKS
def test_it_survives_save_and_load(feedback: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = interleaved("gpt_neox", feedback).float().eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.feedback == feedback
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_initial_projections_are_divided_as_published() -> None:
    """LUMIA-Group/PonderLM-2: GPT-NeoX divides by sqrt(2 L (K + 1)), LLaMA by sqrt(2 L)."""
    for architecture, passes in (("gpt_neox", 2), ("llama", 1)):
        model = make(architecture, feedback="latent", pondering_steps=1, num_hidden_layers=4, hidden_size=256)
        weight = next(
            p for name, p in model.named_parameters() if name.endswith(("attention.dense.weight", "o_proj.weight"))
        )
        expected = (2 / (5 * 256)) ** 0.5 / (2 * 4 * passes) ** 0.5 * 0.9866  # truncation at three sigma
        assert weight.std().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exit_kl": 0.1, "use_cache": True}, "exit_kl with feedback 'latent', which has one prediction a token"),
        ({"sequence_steps": torch.tensor([1, 2])}, "sequence_steps with feedback 'latent'"),
        ({"backward_passes": 1}, "backward_passes with feedback 'latent'"),
        ({"pass_weights": [0.5, 0.5, 1.0], "labels": torch.zeros(2, LENGTH, dtype=torch.long)}, "pass_weights with"),
        ({"output_hidden_states": True}, "output_hidden_states would show 'latent' positions"),
        ({"output_attentions": True}, "output_attentions would show"),
        ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)}, r"expected \(B, T\)"),
        ({"refinements": -1}, "refinements is -1; expected an integer of at least 0"),
    ],
    ids=str,
)
def test_what_would_be_wrong_beside_it_is_refused(options: dict[str, Any], said: str, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=said):
        interleaved()(tokens, **options)


def test_more_that_would_be_wrong_is_refused(tokens: torch.Tensor) -> None:
    model = make(feedback="latent", pondering_steps=1).eval()
    with pytest.raises(ValueError, match="feedback 'latent' needs a cache of DynamicLayer, found StaticLayer"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2)
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache holds 7 tokens for the first pass and 0 for pass 3"):
        model(tokens, past_key_values=cache, pondering_steps=2)
    with pytest.raises(ValueError, match="refinements with feedback 'pause', which has no latents"):
        make(feedback="pause", pondering_steps=1)(tokens, refinements=2)
    plain = make(pondering_steps=1)
    with pytest.raises(ValueError, match="refinements belong to feedback 'latent'"):
        plain(tokens, refinements=2)
    plain.config.feedback = "pause"
    with pytest.raises(ValueError, match="made without a pause embedding; set feedback"):
        plain(tokens)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention is 'flash_attention_2' with feedback 'latent'"):
        model(tokens)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"residual": "replace"}, "residual is 'replace' with feedback 'latent', which adds positions"),
        ({"halting": "gate"}, "halting is 'gate' with feedback 'latent'"),
        ({"pondering_top_k": 3}, "which feedback 'latent' does not use"),
        ({"pondering_temperature": 0.5}, "which feedback 'latent' does not use"),
    ],
    ids=str,
)
def test_fields_that_it_does_not_use_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(feedback="latent", **fields)
