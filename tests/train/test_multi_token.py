"""Runs with heads for the tokens further ahead: what is recorded, planned and refused, and how they are resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.checkpoint.find import find
from ponder_scale.checkpoint.weights import read_weights
from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.evaluate.generate import load_checkpoint
from ponder_scale.export.card import model_card
from ponder_scale.export.folder import write_folder
from ponder_scale.export.verify import verify_in_fresh_process
from ponder_scale.planning.activations import micro_batch
from ponder_scale.settings import load
from ponder_scale.setup.build import model_configuration
from ponder_scale.train.optim import parameter_groups
from tests.model.architectures import make
from tests.ranks import run_ranks
from tests.train.resumes import check_resume
from tests.train.runs import overrides, records, train_on_a_rank

HEADS = ["model.extra_heads=2", "train.multi_token_weight=0.5"]


def test_a_run_records_the_losses_of_its_heads_and_its_folder_has_them(shards: Any, tmp_path: Path) -> None:
    settings = overrides(
        tmp_path / "run",
        shards,
        *HEADS,
        "evaluate.every_steps=2",
        "train.sanity_step=true",
        "model.max_position_embeddings=64",
    )
    assert run_ranks(train_on_a_rank, [{"overrides": settings}], 2) == [["done", "done"]]
    lines = records(tmp_path / "run")
    steps = [line for line in lines if line["event"] == "step"]
    assert all(len(line["multi_token_losses"]) == 2 for line in steps)
    assert all(line["loss"] == line["pass_losses"][-1] for line in steps), (
        "the loss of the next token stays the plain one"
    )
    assert steps[-1]["multi_token_losses"] != steps[0]["multi_token_losses"]
    assert any(line["event"] == "evaluation" for line in lines)
    checkpoint = find(tmp_path / "run")
    model, folder = load_checkpoint(checkpoint)[0].cpu(), tmp_path / "folder"
    write_folder(
        folder,
        model.config,
        read_weights(checkpoint),
        dtype="float32",
        card=lambda count: model_card("ahead", model.config, count, {}),
        tokenizer=None,
    )
    verify_in_fresh_process(checkpoint, folder, dtype="float32")
    again = type(model).from_pretrained(folder).eval()
    tokens = torch.arange(8).view(1, -1)
    assert torch.equal(again(tokens, extra_logits=True).extra_logits, model(tokens, extra_logits=True).extra_logits)
    assert "| extra heads, for the tokens further ahead | 2 |" in (folder / "README.md").read_text()


def test_a_run_with_heads_is_resumed_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    """Also with evaluations in the middle, which run no heads, so that ZeRO-3 sees another order of modules."""
    case = {"precision": "bf16", "more": [*HEADS, "evaluate.every_steps=1"]}
    ways = [("zero3", "pass", "fixed"), ("zero3", "none", "uniform"), ("zero1", "layer", "uniform")]
    names = ("deepspeed", "recompute", "schedule")
    check_resume(shards, tmp_path, [{**case, **dict(zip(names, way, strict=True))} for way in ways])


def test_muon_updates_the_matrices_of_the_heads_as_those_of_the_layers(shards: Any, tmp_path: Path) -> None:
    muon = ["optim.optimizer=muon", "optim.muon_lr=1e-2", "optim.grad_clip=null"]
    config = load(RunConfig, None, overrides(tmp_path, shards, *HEADS, *muon))
    model = make("llama", pondering_steps=2, extra_heads=2)
    matrices = {id(weight) for weight in model.extra_heads.parameters() if weight.ndim > 1}
    updated = [
        weight for group in parameter_groups(model, config.optim) if group["use_muon"] for weight in group["params"]
    ]
    assert matrices and matrices <= {id(weight) for weight in updated}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.halting=gate", "model.extra_heads is 2 with model.halting gate: the heads read the last pass"),
        ("data.seq_len=2", "model.extra_heads is 2, but data.seq_len is 2, so the last of them would have no label"),
        ("train.multi_token_weight=0", "train.multi_token_weight"),
        ("model.extra_heads=-1", "model.extra_heads"),
    ],
)
def test_what_does_not_go_with_it_is_refused(setting: str, said: str, shards: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(RunConfig, None, overrides(tmp_path, shards, *HEADS, setting))


def test_the_planner_traces_the_heads_and_keeps_little_of_them_where_passes_are_recomputed(
    shards: Any, tmp_path: Path
) -> None:
    peaks = {}
    for heads in (0, 2):
        for policy in ("none", "pass"):
            more = [f"model.extra_heads={heads}", f"train.recompute={policy}", "data.document_mask=true"]
            config = load(RunConfig, None, overrides(tmp_path, shards, *more))
            configuration = model_configuration(config.model, vocab_size=96, seq_len=config.data.seq_len, eod_id=0)
            peaks[heads, policy] = micro_batch(config, configuration)
    assert peaks[2, "none"].alive.peak > peaks[0, "none"].alive.peak
    assert peaks[2, "pass"].alive.peak < peaks[2, "none"].alive.peak
    products = [len(peaks[heads, "pass"].operations.products) for heads in (0, 2)]
    assert products[1] > products[0]
