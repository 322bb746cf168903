"""Documents packed in one sequence do not see each other, in any pondering pass."""

import pytest
import torch

from tests.model.architectures import TINY, make

DOCUMENTS = ((0, 7), (7, 12), (12, 24))


@pytest.fixture(scope="module", params=[(name, kind) for name in TINY for kind in ("eager", "sdpa")], ids="-".join)
def model(request):
    name, attention = request.param
    return make(name, pondering_steps=3, attn_implementation=attention).eval()


def logits(model, tokens, positions):
    with torch.no_grad():
        return model(tokens, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("rows", [1, 3])
def test_a_packed_document_gets_the_logits_it_gets_alone(model, rows):
    tokens = torch.randint(0, 60, (rows, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(end - begin) for begin, end in DOCUMENTS]).expand(rows, -1)
    packed = logits(model, tokens, positions)
    for begin, end in DOCUMENTS:
        alone = logits(model, tokens[:, begin:end], torch.arange(end - begin).expand(rows, -1))
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_cross_documents_in_any_pass(model):
    tokens = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(end - begin) for begin, end in DOCUMENTS]).expand(2, -1)
    embedding = model.get_input_embeddings()
    seen = []
    handle = embedding.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad_()))
    try:
        out = model(tokens, position_ids=positions, use_cache=False).logits
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(out[:, 7:12].square().sum(), seen[0])
    reached = gradient.abs().sum(-1) > 0
    assert reached[:, 7:12].all() and not reached[:, :7].any() and not reached[:, 12:].any()


def test_without_positions_that_restart_documents_do_see_each_other(model):
    tokens = torch.randint(0, 60, (1, 24), generator=torch.Generator().manual_seed(3))
    other = tokens.clone()
    other[:, :7] = (other[:, :7] + 1) % 60
    plain = torch.arange(24).unsqueeze(0)
    assert not torch.allclose(logits(model, tokens, plain)[:, 7:], logits(model, other, plain)[:, 7:])
