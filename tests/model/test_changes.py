"""What each pass changes, against the numbers of whole forwards."""

from __future__ import annotations

import pytest
import torch

from tests.model.architectures import TINY, VOCABULARY, make, make_confident

TOKENS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("tied", [False, True])
def test_changes_are_those_between_the_predictions_of_fewer_steps(architecture: str, tied: bool) -> None:
    steps = 3
    model = make_confident(architecture, pondering_steps=steps, tie_word_embeddings=tied)
    with torch.no_grad():
        output = model(TOKENS, labels=TOKENS, track=10**6)
        log_p = [model(TOKENS, pondering_steps=number).logits.log_softmax(-1) for number in range(steps + 1)]
        inputs = []
        model.run_pass = lambda e, *rest, **options: (
            inputs.append(e) or type(model).run_pass(model, e, *rest, **options)
        )
        model(TOKENS)
    changes = output.changes
    for index in range(steps):
        after, before = log_p[index + 1], log_p[index]
        kl = torch.nn.functional.kl_div(before, after, log_target=True, reduction="sum") / TOKENS.numel()
        assert changes.pass_kls[index].item() == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)
        cosine = torch.cosine_similarity(inputs[index], inputs[index + 1], dim=-1).mean()
        assert changes.embed_cosines[index].item() == pytest.approx(cosine.item(), rel=1e-4)
        update = (inputs[index + 1] - inputs[index]).norm(dim=-1).mean()
        assert changes.update_norms[index].item() == pytest.approx(update.item(), rel=1e-4)
    norms = [e.norm(dim=-1).mean().item() for e in inputs]
    assert changes.embed_norms.tolist() == pytest.approx(norms, rel=1e-4)


def test_a_sample_is_spread_over_the_tokens_and_changes_no_gradient() -> None:
    gradients = []
    for track in (None, 5):
        model = make("llama", pondering_steps=2)
        output = model(TOKENS, labels=TOKENS, track=track)
        output.loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert (output.changes is None) == (track is None)
    assert all(torch.equal(plain, tracked) for plain, tracked in zip(*gradients, strict=True))
    everything = make("llama", pondering_steps=2)(TOKENS, labels=TOKENS, track=24).changes
    assert output.changes.embed_norms != pytest.approx(everything.embed_norms, rel=1e-6)
    assert output.changes.embed_norms.tolist() == pytest.approx(everything.embed_norms.tolist(), rel=0.3)


def test_without_pondering_there_are_norms_and_no_changes() -> None:
    changes = make("llama", pondering_steps=0)(TOKENS, track=8).changes
    assert changes.embed_norms.shape == (1,) and changes.pass_kls.shape == changes.embed_cosines.shape == (0,)


def test_the_z_loss_is_told_apart_from_the_loss() -> None:
    model = make("llama", pondering_steps=1)
    plain, with_z = model(TOKENS, labels=TOKENS), model(TOKENS, labels=TOKENS, z_loss=0.01)
    lse = model(TOKENS).logits[:, :-1].logsumexp(-1)
    assert plain.z_loss is None
    assert with_z.z_loss.item() == pytest.approx(0.01 * lse.square().mean().item(), rel=1e-4)
    assert (with_z.loss - with_z.z_loss).item() == pytest.approx(plain.loss.item(), rel=1e-5)
    assert torch.equal(with_z.pass_losses, plain.pass_losses)
