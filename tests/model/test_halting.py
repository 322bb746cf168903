"""Learned halting, against loops over tokens and passes that compute only what is active."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ponder_scale.model.halting import OPEN, smallest_gates
from ponder_scale.setup.recompute import apply_recompute
from tests.model.architectures import TINY, VOCABULARY, make
from tests.model.equations import exits_by_the_equations, halting_by_the_equations

ARCHITECTURES = pytest.mark.parametrize("architecture", TINY)
VARIANTS = pytest.mark.parametrize(
    "fields",
    [{}, {"residual": "restart", "pondering_temperature": 0.8, "pondering_top_k": 9}, {"feedback": "hidden"}],
    ids=str,
)
STEPS = 3


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def halting(architecture: str = "llama", kind: str = "gate", **fields: Any) -> Any:
    """A model in fp64 whose gates differ from token to token, so that some halt in each pass."""
    fields = {"pondering_steps": STEPS, "halting_threshold": 0.5, "scale_embeds": True, **fields}
    model = make(architecture, halting=kind, **fields).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for gate in model.halting_gates:
            gate.up.weight.normal_(generator=generator)
            gate.down.weight.normal_(std=1.0, generator=generator)
            gate.down.bias.fill_(0.7)
    return model


@ARCHITECTURES
@VARIANTS
def test_logits_losses_and_gradients_are_those_of_loops_over_what_is_active(
    architecture: str, fields: dict[str, Any], tokens: torch.Tensor
) -> None:
    model = halting(architecture, **fields)
    output = model(tokens, labels=tokens, skip_logits=False, halting_loss=(0.3, 0.8), z_loss=1e-3)
    output.loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits, gates, active = halting_by_the_equations(model, tokens)
    torch.testing.assert_close(output.logits, logits, atol=1e-10, rtol=1e-10)
    shares = active[:, :, :-1].double().mean((1, 2))
    assert 0 < shares[2] < shares[1] < 1, f"nothing to see with {shares}"
    torch.testing.assert_close(output.pass_shares.double(), shares)
    smallest = gates[:, :, :-1].flatten().sort().values
    added = 0.3 * smallest[: math.floor(0.8 * len(smallest))].mean()
    said = logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(said, tokens[:, 1:].flatten()) + added + 1e-3 * said.logsumexp(-1).square().mean()
    torch.testing.assert_close(output.loss, loss, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(output.halting_loss, added.detach(), atol=1e-12, rtol=1e-10)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], expected, atol=1e-10, rtol=1e-8, msg=name)
    assert all(got[f"halting_gates.{step}.up.weight"].abs().max() > 0 for step in range(STEPS))


@ARCHITECTURES
@VARIANTS
def test_the_loss_of_exits_is_the_expected_one_of_dense_passes(
    architecture: str, fields: dict[str, Any], tokens: torch.Tensor
) -> None:
    """In training every token runs every pass, whatever its gates say."""
    model = halting(architecture, "exit", **fields).train()
    with torch.no_grad():
        for gate in model.halting_gates:
            gate.down.weight.mul_(0.1)
    labels = tokens.clone()
    labels[0, 3:6] = -100
    output = model(tokens, labels=labels, skip_logits=False, halting_loss=(0.2, 0.0))
    output.loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits, p = exits_by_the_equations(model, tokens)
    assert p.min() > 1e-3 and p.max() < 0.99, "nothing to see"
    torch.testing.assert_close(p.sum(0), torch.ones_like(p[0]))
    torch.testing.assert_close(output.logits, logits[-1], atol=1e-12, rtol=1e-10)
    counted = labels[:, 1:] != -100
    wanted = tokens[:, 1:].repeat(STEPS + 1, 1, 1).flatten()
    losses = F.cross_entropy(logits[:, :, :-1].flatten(0, 2), wanted, reduction="none")
    losses, p = losses.view(STEPS + 1, 2, -1)[:, counted], p[:, :, :-1][:, counted]
    loss = ((p * losses).sum(0) + 0.2 * (p * p.log()).sum(0)).mean()
    torch.testing.assert_close(output.loss, loss, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(output.pass_losses.double(), losses.mean(1))
    torch.testing.assert_close(output.halting_loss, (loss - losses[-1].mean()).detach(), atol=1e-12, rtol=1e-8)
    torch.testing.assert_close(output.pass_shares.double(), p.flip(0).cumsum(0).flip(0).mean(1))
    loss.backward()
    for name, parameter in model.named_parameters():
        # norms and rotations are in fp32, and the passes of the equations go through them one by one
        torch.testing.assert_close(got[name], parameter.grad, atol=2e-7, rtol=1e-6, msg=name)


@ARCHITECTURES
def test_exits_halt_after_training_by_what_their_gates_leave(architecture: str, tokens: torch.Tensor) -> None:
    model = halting(architecture, "exit", halting_threshold=0.35).eval()
    with torch.no_grad():
        logits, _, active = halting_by_the_equations(model, tokens)
        torch.testing.assert_close(model(tokens).logits, logits, atol=1e-10, rtol=1e-10)
        shares = active.double().mean((1, 2))
        assert 0 < shares[2] < shares[1] < 1, f"nothing to see with {shares}"
        seen = model(tokens, labels=tokens).pass_shares
        torch.testing.assert_close(seen.double(), active[:, :, :-1].double().mean((1, 2)), atol=1e-6, rtol=0)
        model.config.halting_threshold = 0.0
        plain = model.train()(tokens, labels=tokens, skip_logits=False)
        torch.testing.assert_close(model.eval()(tokens).logits, plain.logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("kind", "passes"), [("gate", 0), ("exit", 1)])
def test_a_token_continues_at_its_threshold_and_halts_a_bit_above_it(
    kind: str, passes: int, tokens: torch.Tensor
) -> None:
    """Gates of g for every token: of "gate" each leaves g, of "exit" the second leaves g^2."""
    model = halting(kind=kind, pondering_steps=2, halting_threshold=0.0).eval()
    with torch.no_grad():
        for gate in model.halting_gates:
            gate.down.weight.zero_()
        (g,) = model.halting_gates[0](torch.zeros(*tokens.shape, model.config.hidden_size).double()).unique().tolist()
        left = {"gate": g, "exit": g * g}[kind]
        all_passes, fewer = (model(tokens, pondering_steps=steps).logits for steps in (2, passes))
        assert not torch.allclose(all_passes, fewer)
        for threshold, expected in ((left, all_passes), (math.nextafter(left, 1.0), fewer)):
            model.config.halting_threshold = threshold
            torch.testing.assert_close(model(tokens).logits, expected, atol=1e-12, rtol=1e-12)


def test_a_gate_that_is_surely_open_has_a_finite_gradient(tokens: torch.Tensor) -> None:
    """The probability of an exit is 0 then, of which the entropy takes the logarithm."""
    model = halting(kind="exit").float()
    with torch.no_grad():
        model.halting_gates[0].down.bias.fill_(200.0)
        model.halting_gates[1].down.bias.fill_(-200.0)
    model(tokens, labels=tokens, halting_loss=(0.2, 0.0)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@ARCHITECTURES
def test_a_threshold_of_0_with_open_gates_is_the_plain_method_and_a_high_one_the_stock_model(
    architecture: str, tokens: torch.Tensor
) -> None:
    model = halting(architecture, halting_threshold=0.0).eval()
    plain = make(architecture, pondering_steps=STEPS, scale_embeds=True).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for gate in model.halting_gates:
            gate.down.weight.zero_()
            gate.down.bias.fill_(50.0)  # sigmoid(50) is 1 in fp32
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-12, rtol=1e-12)
        for gate in model.halting_gates:
            gate.down.bias.fill_(-5.0)
        model.config.halting_threshold = 0.5
        output = model(tokens, labels=tokens)
        torch.testing.assert_close(output.logits, plain(tokens, pondering_steps=0).logits, atol=1e-12, rtol=1e-12)
        assert output.pass_shares.tolist() == [1.0, 0.0, 0.0, 0.0]
        assert output.pass_losses.unique().numel() == 1


@ARCHITECTURES
@pytest.mark.parametrize("policy", ["selective", "layer", "pass", "pass+layer"])
def test_recomputation_changes_no_bit_also_with_several_documents_in_a_row(
    architecture: str, policy: str, tokens: torch.Tensor
) -> None:
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    model, found = halting(architecture), []
    for each in ("none", policy):
        apply_recompute(model, each)
        model.zero_grad()
        for position_ids in (None, positions):
            output = model(tokens, labels=tokens, position_ids=position_ids, halting_loss=(0.1, 0.9))
            output.loss.backward()
        found.append([output.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


@ARCHITECTURES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_in_one_row_do_not_see_each_other(architecture: str, attention: str, tokens: torch.Tensor) -> None:
    model = halting(architecture, attn_implementation=attention).eval()
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    with torch.no_grad():
        packed = model(tokens, position_ids=positions).logits
        alone = torch.cat([model(tokens[:, :5]).logits, model(tokens[:, 5:]).logits], 1)
    close = 1e-12 if attention == "sdpa" else 1e-6  # eager attention has its softmax in fp32
    torch.testing.assert_close(packed, alone, atol=close, rtol=close)


def test_documents_are_refused_with_an_attention_that_takes_no_mask_of_them(tokens: torch.Tensor) -> None:
    model, positions = halting(), torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention is 'flex_attention', which cannot separate the documents of a row"):
        model(tokens, position_ids=positions)


@ARCHITECTURES
@pytest.mark.parametrize("kind", ["gate", "exit"])
@pytest.mark.parametrize("pieces", [[1] * 12, [7, 5], [7, 1, 1, 3]], ids=["singly", "halves", "mixed"])
def test_a_cache_that_is_filled_in_pieces_gives_what_the_whole_text_does(
    architecture: str, pieces: list[int], kind: str, tokens: torch.Tensor
) -> None:
    model, cache, logits = halting(architecture, kind).eval(), None, []
    with torch.no_grad():
        for piece in tokens.split(pieces, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        whole = model(tokens).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-12, rtol=1e-12)
    assert model(tokens).past_key_values is None and len(model.base_model(tokens, return_dict=False)) == 1
    assert len(cache.layers) == (STEPS + 1) * model.num_layers
    assert {layer.get_seq_length() for layer in cache.layers} == {12}


@ARCHITECTURES
def test_generation_with_a_cache_beams_padding_and_a_draft_gives_what_it_does_without(
    architecture: str, tokens: torch.Tensor
) -> None:
    model = halting(architecture).eval()
    mask = torch.ones_like(tokens)
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": mask}
    for more in ({}, {"num_beams": 3}):
        plain = model.generate(tokens, use_cache=False, **options, **more)
        assert torch.equal(model.generate(tokens, **options, **more), plain)
    padded = F.pad(tokens, (3, 0))
    left = model.generate(padded, **{**options, "attention_mask": F.pad(mask, (3, 0))})
    assert torch.equal(left[:, 3:], model.generate(tokens, **options))
    one = {**options, "attention_mask": mask[:1]}
    drafted = model.generate(tokens[:1], assistant_model=model.draft(1), **one)
    assert torch.equal(drafted, model.generate(tokens[:1], **one))


def test_decoding_runs_no_pass_in_which_every_token_has_halted(tokens: torch.Tensor) -> None:
    model = halting().eval()
    runs: list[int] = []

    def counted(run_pass: Any, embeds: torch.Tensor, index: int, *arguments: Any, **options: Any) -> Any:
        runs.append(index)
        return run_pass(embeds, index, *arguments, **options)

    model.wrappers = (counted,)
    with torch.no_grad():
        seen = model(tokens[:1], labels=tokens[:1])
        depths = halting_by_the_equations(model, tokens[:1])[2].sum(0)[0]  # passes of each token
        assert runs == [0, 1, 2, 3] and seen.pass_losses.shape == (4,), "statistics are of all passes"
        cache = None
        for position in range(12):
            runs.clear()
            output = model(tokens[:1, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            assert len(runs) == depths[position]
    assert len(set(depths.tolist())) > 2


@ARCHITECTURES
@pytest.mark.parametrize("kind", ["gate", "exit"])
@pytest.mark.parametrize("fields", [{}, {"feedback": "hidden"}, {"feedback": "both", "residual": "restart"}], ids=str)
def test_a_decoded_batch_runs_a_pass_for_the_rows_that_have_not_halted(
    architecture: str, kind: str, fields: dict[str, Any]
) -> None:
    tokens = torch.randint(0, VOCABULARY, (5, 14), generator=torch.Generator().manual_seed(2))
    model, rows = halting(architecture, kind, **fields).eval(), []

    def count(layer: Any, arguments: Any, options: Any) -> None:
        rows.append((arguments[0] if arguments else options["hidden_states"]).shape[0])

    def decode(tokens: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
        """The last logits of some pieces of the text, and how many rows ran in each pass for each."""
        cache, logits, ran, mask = None, [], [], (torch.arange(14) >= padding[:, None]).long()
        positions = (torch.arange(14) - padding[:, None]).clamp(min=0)
        for begin, end in pairwise((0, 6, 7, 8, 9, 10, 12, 14)):
            rows.clear()
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            output = model(tokens[:, begin:end], past_key_values=cache, use_cache=True, **given)
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
            ran.append(list(rows))
        assert {layer.get_seq_length() for layer in cache.layers} == {14}
        return torch.stack(logits[1:], 1), ran[1:]

    model.layers[0].register_forward_pre_hook(count, with_kwargs=True)
    padding = torch.tensor([0, 2, 1, 0, 3])
    with torch.no_grad():
        together, ran = decode(tokens, padding)
        alone = [decode(tokens[row : row + 1], padding[row : row + 1]) for row in range(5)]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), atol=1e-12, rtol=1e-12)
    assert ran == [
        [count for count in (sum(len(each[at]) > index for _, each in alone) for index in range(STEPS + 1)) if count]
        for at in range(6)
    ]
    assert any(0 < count < 5 for each in ran for count in each)


def test_more_pondering_steps_than_there_are_gates_use_the_last_gate(tokens: torch.Tensor) -> None:
    model = halting(halting_threshold=0.2).eval()
    with torch.no_grad():
        logits = model(tokens, pondering_steps=STEPS + 2).logits
        expected = halting_by_the_equations(model, tokens, steps=STEPS + 2)[0]
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)


def test_the_loss_counts_no_token_without_a_label() -> None:
    gates = [torch.tensor([[0.5, 0.0, 0.2]]), torch.tensor([[0.4, 0.0, 0.0]])]
    counted = torch.tensor([[True, False, True]])
    assert smallest_gates(gates, counted, 0.5).item() == pytest.approx((0.0 + 0.2) / 2)
    assert smallest_gates(gates, counted, 1.0).item() == pytest.approx((0.0 + 0.2 + 0.4 + 0.5) / 4)
    assert smallest_gates(gates, counted, 0.1).item() == 0.0, "no gate at all"
    assert smallest_gates(gates, torch.zeros_like(counted), 1.0).item() == 0.0


@ARCHITECTURES
def test_gates_start_open_and_alike_and_survive_save_and_load(
    architecture: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    new = make(architecture, pondering_steps=2, halting="gate")
    output = new(tokens, labels=tokens, halting_loss=(0.1, 1.0))
    assert output.pass_shares.tolist() == [1.0, 1.0, 1.0]
    assert output.halting_loss.item() == pytest.approx(0.1 / (1 + math.exp(-OPEN)), rel=1e-6)
    model = halting(architecture, halting_threshold=0.4).float().eval()
    model.save_pretrained(tmp_path / "halting")
    again = type(model).from_pretrained(tmp_path / "halting").eval()
    assert again.config.halting == "gate" and again.config.halting_threshold == 0.4
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    plain = make(architecture, pondering_steps=2).eval()
    plain.save_pretrained(tmp_path / "plain")
    opened = type(model).from_pretrained(tmp_path / "plain", halting="gate").eval()
    assert [gate.down.bias.item() for gate in opened.halting_gates] == [OPEN, OPEN]
    assert all(gate.down.weight.abs().max() == 0 and gate.up.weight.abs().max() > 0 for gate in opened.halting_gates)


def test_gates_that_a_step_does_not_use_get_a_gradient_of_zero(tokens: torch.Tensor) -> None:
    """ZeRO-3 would take the gradient of the step before for that of a weight that is not used."""
    model = halting()
    for steps in (0, 1):
        model.zero_grad()
        loss = model(tokens, labels=tokens, pondering_steps=steps).loss
        loss.backward()
        for index, gate in enumerate(model.halting_gates):
            assert (gate.up.weight.grad.abs().max() > 0) == (index < steps)
        with torch.no_grad():
            assert loss.item() == model(tokens, labels=tokens, pondering_steps=steps).loss.item()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exit_kl": 0.1, "use_cache": True}, "exit_kl with learned halting: each decides how deep a token goes"),
        ({"sequence_steps": torch.tensor([1, 2])}, "sequence_steps with learned halting"),
        ({"backward_passes": 1}, "backward_passes with learned halting"),
        ({"output_hidden_states": True}, "output_hidden_states would show states that halted tokens do not keep"),
        ({"output_attentions": True}, "output_attentions would show"),
    ],
    ids=str,
)
def test_what_would_be_wrong_beside_it_is_refused(options: dict[str, Any], said: str, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=said):
        halting()(tokens, **options)


def test_ways_that_would_lose_what_halted_tokens_keep_are_refused(tokens: torch.Tensor) -> None:
    model = halting()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing of transformers drops the keys and values"):
        model(tokens, labels=tokens)
    model.gradient_checkpointing_disable()
    with pytest.raises(ValueError, match="halting needs a cache of DynamicLayer, found StaticLayer"):
        model.eval().generate(tokens, cache_implementation="static", max_new_tokens=2)
    plain = make(pondering_steps=2)
    with pytest.raises(ValueError, match="halting_loss needs a model with halting 'gate' or"):
        plain(tokens, labels=tokens, halting_loss=(0.1, 0.1))
    exits = halting(kind="exit")
    for more in ({"z_loss": 1e-4}, {"pass_weights": [0.25] * 4}):
        with pytest.raises(ValueError, match="halting 'exit' weighs the losses of the passes itself; leave out z_loss"):
            exits(tokens, labels=tokens, halting_loss=(0.1, 0.1), **more)
    plain.config.halting = "gate"
    with pytest.raises(ValueError, match="halting is 'gate', but this model was made without gates"):
        plain(tokens)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"halting": "soft"}, "halting is 'soft'; expected one of none, gate, exit"),
        ({"halting_threshold": 1.5}, "halting_threshold is 1.5; expected a number from 0 to 1"),
        ({"halting_threshold": True}, "halting_threshold is True"),
    ],
    ids=str,
)
def test_fields_out_of_their_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**fields)
