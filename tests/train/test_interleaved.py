"""Runs of latents and pause tokens: what is drawn, recorded and refused, and how such a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.setup.build import make_model
from ponder_scale.setup.speed import apply_speed
from ponder_scale.train.optim import parameter_groups
from ponder_scale.train.schedules import step_depth
from tests.model.architectures import make
from tests.train.resumes import check_resume
from tests.train.runs import overrides


def test_the_refinements_of_a_step_are_drawn_by_seed_and_step_as_published(shards: Any, tmp_path: Path) -> None:
    def drawn(*more: str) -> list[int | None]:
        config = load(RunConfig, None, overrides(tmp_path, shards, *more))
        return [step_depth(step, config).refinements for step in range(1, 200)]

    llama = drawn("model.feedback=latent")
    assert set(llama) == {2, 3} and llama == drawn("model.feedback=latent") != drawn("model.feedback=latent", "seed=9")
    assert set(drawn("model.feedback=latent", "model.architecture=gpt_neox")) == {2, 3, 4}
    assert set(drawn("model.feedback=pause")) == set(drawn()) == {None}


def test_runs_are_resumed_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    case = {"deepspeed": "zero3", "precision": "bf16", "recompute": "pass", "schedule": "uniform"}
    check_resume(shards, tmp_path, [{**case, "more": [f"model.feedback={each}"]} for each in ("latent", "pause")])


def test_the_pause_has_the_decay_and_the_learning_rate_of_the_embedding_table(shards: Any, tmp_path: Path) -> None:
    config = load(RunConfig, None, overrides(tmp_path, shards, "optim.weight_decay=0.1"))
    model = make("llama", pondering_steps=2, feedback="pause", scale_embeds=True)
    tables = (model.get_input_embeddings().weight, model.pause_embedding.weight)
    for group in parameter_groups(model, config.optim):
        inside = [any(weight is table for weight in group["params"]) for table in tables]
        assert inside[0] == inside[1]


@pytest.mark.parametrize("feedback", ["latent", "pause"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            ["train.pondering.per=sequence", "train.pondering.schedule=uniform"],
            "train.pondering.per is sequence with model.feedback FEEDBACK, which has one prediction a token",
        ),
        (["train.pondering.backward_passes=1"], "train.pondering.backward_passes is 1 with model.feedback FEEDBACK"),
        (["train.pass_losses=uniform"], "train.pass_losses is uniform with model.feedback FEEDBACK"),
        (["train.attention=flash_attention_2"], "train.attention is flash_attention_2 with model.feedback FEEDBACK"),
    ],
    ids=str,
)
def test_what_makes_no_sense_beside_positions_is_refused(
    feedback: str, setting: list[str], said: str, shards: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said.replace("FEEDBACK", feedback)):
        load(RunConfig, None, overrides(tmp_path, shards, f"model.feedback={feedback}", *setting))


def test_a_field_of_the_model_that_positions_do_not_use_is_refused(shards: Any, tmp_path: Path) -> None:
    config = load(RunConfig, None, overrides(tmp_path, shards, "model.feedback=latent", "model.residual=restart"))
    with pytest.raises(ConfigError, match="model: residual is 'restart' with feedback 'latent'"):
        make_model(config, shards)


def test_attention_is_sdpa_where_flash_would_be_chosen(
    shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ponder_scale.setup.speed._flash_is_missing", lambda train: None)
    config = load(RunConfig, None, overrides(tmp_path, shards))
    model = make("llama", pondering_steps=1, feedback="pause")
    apply_speed(model, config.train)
    assert model.config._attn_implementation == "sdpa"
