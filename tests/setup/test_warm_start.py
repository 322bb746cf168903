"""Folders that others made as the start of a run: stock ones, published ones, ours."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ponder_scale.checkpoint.find import find, read_state
from ponder_scale.config import RunConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.errors import CheckpointError
from ponder_scale.settings import load
from ponder_scale.setup.warm_start import folder_configuration, warm_start
from ponder_scale.train.versions import code_commit
from tests.export.published import published_folder
from tests.model.architectures import TINY, make
from tests.model.published import CASES, ORACLE
from tests.ranks import run_ranks
from tests.train.runs import records, train_on_a_rank

TOKENS = torch.arange(12).view(2, 6)


def stock_folder(architecture: str, folder: Path, **fields: Any) -> Any:
    """Save a stock model with weights of its own, and return it."""
    tiny = TINY[architecture]
    torch.manual_seed(5)
    stock = tiny.stock_model(tiny.stock_configuration(**{**tiny.shape, **fields})).eval()
    stock.save_pretrained(folder)
    return stock


@pytest.mark.parametrize("architecture", TINY)
def test_a_warm_start_from_a_stock_folder_is_that_model_until_it_ponders(architecture: str, tmp_path: Path) -> None:
    stock = stock_folder(architecture, tmp_path)
    model = make(architecture, pondering_steps=2, pondering_temperature=0.5, residual="restart").eval()
    warm_start(model, tmp_path)
    assert torch.equal(model(TOKENS, pondering_steps=0).logits, stock(TOKENS).logits)
    assert not torch.equal(model(TOKENS).logits, stock(TOKENS).logits)


@pytest.mark.parametrize("architecture", TINY)
def test_a_gate_that_a_folder_does_not_have_starts_closed_and_one_that_it_has_is_taken(
    architecture: str, tmp_path: Path
) -> None:
    plain = make(architecture, seed=5, pondering_steps=2).eval()
    plain.save_pretrained(tmp_path / "plain")
    model = make(architecture, pondering_steps=2, feedback="both").eval()
    warm_start(model, tmp_path / "plain")
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    with torch.no_grad():
        model.hidden_gate.weight.fill_(0.5)
    model.save_pretrained(tmp_path / "both")
    again = make(architecture, seed=6, pondering_steps=2, feedback="both").eval()
    warm_start(again, tmp_path / "both")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(
        CheckpointError, match=r"hidden_gate.weight has shape \(32,\), but the model has no such parameter"
    ):
        warm_start(plain, tmp_path / "both")
    weights = load_file(tmp_path / "both" / "model.safetensors")
    del weights["hidden_gate.weight"]
    save_file(weights, tmp_path / "both" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weight for hidden_gate.weight"):
        warm_start(again, tmp_path / "both")


def test_heads_of_a_folder_are_taken_new_ones_are_added_and_others_are_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = make(pondering_steps=2, extra_heads=2, seed=5).eval()
    theirs.save_pretrained(tmp_path)
    for heads in (0, 1, 2, 3):
        caplog.clear()
        model = make(pondering_steps=2, extra_heads=heads).eval()
        fresh = None if heads < 3 else model.extra_heads[2].mlp.up_proj.weight.clone()
        warm_start(model, tmp_path)
        assert torch.equal(model(TOKENS).logits, theirs(TOKENS).logits)
        if heads:
            ahead = [each(TOKENS, extra_logits=True).extra_logits[: min(heads, 2)] for each in (model, theirs)]
            assert torch.equal(*ahead)
        assert fresh is None or torch.equal(model.extra_heads[2].mlp.up_proj.weight, fresh)
        said = f"its last {2 - heads} of 2 extra heads are left out, because model.extra_heads is {heads}"
        assert (said in caplog.text) == (heads < 2)


@pytest.mark.parametrize("architecture", TINY)
def test_a_pause_that_a_folder_does_not_have_starts_new_and_one_that_it_has_is_taken(
    architecture: str, tmp_path: Path
) -> None:
    stock = stock_folder(architecture, tmp_path / "stock")
    model = make(architecture, pondering_steps=2, feedback="pause").eval()
    own = model.pause_embedding.weight.clone()
    warm_start(model, tmp_path / "stock")
    assert torch.equal(model.pause_embedding.weight, own) and own.abs().max() > 0
    assert torch.equal(model(TOKENS, pondering_steps=0).logits, stock(TOKENS).logits)
    model.save_pretrained(tmp_path / "pause")
    again = make(architecture, seed=6, pondering_steps=2, feedback="pause").eval()
    warm_start(again, tmp_path / "pause")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_run_of_latents_starts_from_a_published_folder_which_another_run_refuses(tmp_path: Path) -> None:
    name = "latent_llama.K1.R3"
    folder = published_folder(tmp_path / "theirs", name)
    configuration = folder_configuration(folder, latent=True)
    model = TINY["llama"].model(configuration).eval()
    warm_start(model, folder)
    inputs = load_file(ORACLE / "inputs.safetensors")
    expected = load_file(ORACLE / CASES[name]["file"])[f"{name}/logits"]
    with torch.no_grad():
        torch.testing.assert_close(model(inputs["input_ids"]).logits, expected, atol=2e-5, rtol=0)
    configuration.feedback = "embedding"
    with pytest.raises(CheckpointError, match="give import-reference --latent, or a run"):
        warm_start(TINY["llama"].model(configuration), folder)


def test_a_warm_start_from_a_published_folder_computes_what_was_published(tmp_path: Path) -> None:
    name = "gpt_neox.S1.scale1.mult0"
    folder = published_folder(tmp_path / "theirs", name)
    torch.manual_seed(0)
    configuration = folder_configuration(folder)
    assert (configuration.pondering_steps, configuration.scale_embeds) == (1, True)
    model = TINY["gpt_neox"].model(configuration).eval()
    warm_start(model, folder)
    expected = load_file(ORACLE / CASES[name]["file"])[f"{name}/logits"]
    with torch.no_grad():
        got = model(load_file(ORACLE / "inputs.safetensors")[CASES[name]["input"]]).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({}, {"scale_embeds": True}, "were trained with scale_embeds False, but this run has True"),
        ({}, {"initial_scale": 3.0}, "were trained with initial_scale 1.0, but this run has 3.0"),
        ({"rms_norm_eps": 1e-3}, {}, "were trained with rms_norm_eps 0.001"),
        ({"hidden_act": "gelu"}, {}, "were trained with hidden_act gelu, but this run has silu"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, "were trained with rope_parameters"),
        ({"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}, {}, "head_dim 4, but this run has 8"),
        ({}, {"intermediate_size": 40}, "were trained with intermediate_size 48, but this run has 40"),
        ({}, {"vocab_size": 60}, "use weights of the same architecture and size"),
    ],
)
def test_weights_that_would_compute_something_else_are_refused(
    theirs: dict[str, Any], ours: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stock_folder("llama", tmp_path, **theirs)
    with pytest.raises(CheckpointError, match=message):
        warm_start(make("llama", **ours), tmp_path)


def test_what_is_no_folder_of_the_architecture_is_answered(
    tmp_path: Path, tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock_folder("llama", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"its architecture is llama, but model\.architecture is olmo2; set it to llama"
    ):
        warm_start(make("olmo2"), tmp_path)
    with pytest.raises(CheckpointError, match="expected a Hugging Face folder"):
        warm_start(make("llama"), tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_bytes((tiny_tokenizer / "tokenizer.json").read_bytes())
    with caplog.at_level(logging.WARNING, "ponder_scale"):
        warm_start(make("llama"), tmp_path, tokenizer="0" * 64)
    assert "is not the one that the shards were made with" in caplog.text
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="model_type is 'bert'; expected one of llama, "):
        warm_start(make("llama"), tmp_path)


def test_a_stock_model_goes_on_as_one_that_learns_to_ponder(tiny_shards: Any, tmp_path: Path) -> None:
    """On two ranks, S ramped from 0 to 2: the first step is the stock model's; a resumed run needs no folder."""
    made = tiny_shards(train=(900,), heldout=(200,), vocab_size=TINY["llama"].shape["vocab_size"])
    (made.folder / "tokenizer").mkdir()
    (made.folder / "tokenizer/tokenizer.json").write_text("{}")
    cases, expected = [], {}
    for architecture, sharding in (("llama", "zero3"), ("gpt_neox", "zero2"), ("gpt2", "zero3")):
        untied = {} if architecture == "gpt2" else {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        stock = stock_folder(architecture, tmp_path / architecture, **untied)
        settings = [
            *(f"run_dir={tmp_path / 'run' / architecture}", f"data.sources.tiny.path={made.folder}"),
            *(f"model.architecture={architecture}", f"model.init_from={tmp_path / architecture}"),
            *("model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2"),
            *("model.num_attention_heads=4", "model.max_position_embeddings=64", "model.scale_embeds=false"),
            *("model.pondering_steps=2", "train.pondering.schedule=ramp", "train.pondering.low=0"),
            *("train.pondering.ramp_steps=4", "data.seq_len=12", "train.steps=4", "train.global_batch=4"),
            *("train.precision=fp32", f"train.deepspeed={sharding}", "log.every_steps=1", "optim.lr=1e-3"),
        ]
        settings += ["model.num_key_value_heads=2"] if architecture == "llama" else []
        settings += [] if architecture == "gpt2" else ["model.rope_theta=5e5"]
        settings += ["model.norm_eps=1e-6"] if architecture == "llama" else []
        cases.append({"overrides": settings})
        expected[architecture] = first_loss(stock, load(RunConfig, None, settings))
    assert run_ranks(train_on_a_rank, cases) == [["done", "done"]] * 3
    shutil.rmtree(tmp_path / "llama")
    longer = {"overrides": [*cases[0]["overrides"], f"run_dir={tmp_path / 'longer'}", "train.steps=5"]}
    shutil.copytree(tmp_path / "run" / "llama", tmp_path / "longer")
    assert run_ranks(train_on_a_rank, [longer]) == [["done", "done"]]
    for architecture, loss in expected.items():
        steps = [line for line in records(tmp_path / "run" / architecture) if line["event"] == "step"]
        assert [line["pondering_steps"] for line in steps] == [0, 1, 1, 2]
        assert steps[0]["loss"] == pytest.approx(loss, abs=1e-5), architecture
        assert read_state(find(tmp_path / "run" / architecture))["commit"] == code_commit()


def first_loss(stock: Any, config: RunConfig) -> float:
    """The stock model's loss on the first batch of a run."""
    sources = open_sources(config.data)
    options = {"seed": config.seed, "global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1}
    loader = Loader(config.data, sources, **options)
    [(tokens, *_)] = loader.next_batches()
    loader.close()
    with torch.no_grad():
        logits = stock(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
