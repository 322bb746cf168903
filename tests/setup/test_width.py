"""One learning rate for all widths: the coordinate check of muP, against the standard way, in which it fails."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ponder_scale.config import ModelConfig, OptimConfig, RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.setup.width import learning_rate_scales, scale_initial_weights
from ponder_scale.train.optim import parameter_groups

HEAD, BASE, WIDTHS = 8, 32, (32, 64, 128, 256)
VOCABULARY, LENGTH, STEPS = 96, 24, 4


def made(architecture: str, width: int, base: int | None, **fields: Any) -> Any:
    tied = {"tie_word_embeddings": False} if architecture == "gpt2" else {}
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // HEAD}
    config = ModelConfig(architecture, num_hidden_layers=2, pondering_steps=2, **{**shape, **tied, **fields})  # type: ignore[arg-type]
    model = build_model(model_configuration(config, vocab_size=VOCABULARY, seq_len=LENGTH, eod_id=0), seed=1)
    scale_initial_weights(model, base)
    return model


def looked_at(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of each pass, (S + 1, B, T, D), what the layers of the first make of theirs, and the logits."""
    given, streams = [], []

    def watched(run: Any, embeds: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        given.append(embeds)
        return run(embeds, *arguments, **options)

    hook = model.layers[-1].register_forward_hook(
        lambda *call: streams.append(call[2][0] if isinstance(call[2], tuple) else call[2])
    )
    model.wrappers = (watched,)
    with torch.no_grad():
        logits = model(tokens).logits
    hook.remove()
    model.wrappers = ()
    return {"inputs": torch.stack(given), "stream": streams[0], "logits": logits}


def trained(architecture: str, width: int, base: int | None, **fields: Any) -> dict[str, float]:
    """How much some steps at one learning rate change what a model computes, as root mean squares; and its inputs."""
    model = made(architecture, width, base, **fields)
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    before = looked_at(model, tokens)
    groups = parameter_groups(model, OptimConfig(lr=1.0, mup_base_width=base))
    for group in groups:
        group["lr"] = 4e-3 * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    after = looked_at(model.eval(), tokens)
    sizes = {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}
    return {**sizes, "last input": after["inputs"][-1].square().mean().sqrt().item()}


def slopes(architecture: str, base: int | None, **fields: Any) -> dict[str, float]:
    """By how much each size grows with width: the exponent of a power law through all widths."""
    found = [trained(architecture, width, base, **fields) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    x -= x.mean()
    logs = {name: torch.tensor([math.log(sizes[name]) for sizes in found]) for name in found[0]}
    return {name: ((x * y).sum() / x.square().sum()).item() for name, y in logs.items()}


@pytest.mark.parametrize(
    ("architecture", "fields"), [("llama", {}), ("llama", {"scale_embeds": False}), ("gpt_neox", {}), ("gpt2", {})]
)
def test_what_a_step_changes_is_as_large_at_every_width(architecture: str, fields: dict[str, Any]) -> None:
    found, plain = slopes(architecture, BASE, **fields), slopes(architecture, None, **fields)
    for name in ("inputs", "stream", "last input"):  # of every pass, the embeddings fed back among them
        assert abs(found[name]) < 0.15, found
    # the initial head is smaller the wider the model is, so the logits begin to move a little less
    assert -0.45 < found["logits"] < 0.1, found
    assert plain["stream"] > 0.4 and plain["logits"] > 0.3, plain


def test_at_its_base_width_a_model_is_the_standard_one() -> None:
    for architecture in ("llama", "gpt_neox", "gpt2", "olmo2"):
        ours, plain = made(architecture, BASE, BASE), made(architecture, BASE, None)
        for weight, same in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(weight, same)
        assert set(learning_rate_scales(ours, BASE).values()) == {1.0}


def test_rates_and_initial_weights_follow_the_table() -> None:
    optim = OptimConfig(weight_decay=0.1, mup_base_width=BASE)
    ours, plain = made("llama", 4 * BASE, BASE), made("llama", 4 * BASE, None)
    rates = {id(weight): group for group in parameter_groups(ours, optim) for weight in group["params"]}
    for name, weight in ours.named_parameters():
        rate = 1.0 if "norm" in name else 0.5 if "embed_tokens" in name else 0.25
        group = rates[id(weight)]
        assert group["lr_scale"] == rate
        decayed = weight.ndim == 2 and "embed_tokens" not in name
        assert group["weight_decay"] == (0.1 / rate if decayed else 0.0)
        factor = 0.5 if "lm_head" in name else 1.0
        assert torch.equal(weight, factor * plain.get_parameter(name))
    unscaled = made("llama", 4 * BASE, BASE, scale_embeds=False)
    assert torch.equal(unscaled.model.embed_tokens.weight, 2 * plain.model.embed_tokens.weight)
    assert learning_rate_scales(unscaled, BASE)[id(unscaled.model.embed_tokens.weight)] == 1.0
    positions = made("gpt2", 4 * BASE, BASE).transformer.wpe.weight
    assert torch.equal(positions, 2 * made("gpt2", 4 * BASE, None).transformer.wpe.weight)


def test_what_cannot_be_widened_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"the head of this gpt2 is its embedding table.*tie_word_embeddings=false"):
        made("gpt2", 64, BASE, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"expected a multiple of the width of a head \(64\)"):
        made("llama", 64, BASE, num_attention_heads=1)
    fixed = ["run_dir=x", "data.sources.a.path=x", "train.steps=9", "train.global_batch=1", "optim.grad_clip=null"]
    muon = ["optim.optimizer=muon", "optim.muon_lr=0.02", "optim.mup_base_width=64"]
    with pytest.raises(ConfigError, match="mup_base_width is 64 with muon"):
        load(RunConfig, None, [*fixed, *muon])
