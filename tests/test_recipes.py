"""Every shipped recipe loads, builds its model and names a sharding file that is accepted.

Answers: recipes that do not run as shipped (GPT-NeoX 610, 1306; OLMo 641, 726, 879; OLMo-core 617).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import data_pipeline
import ponder_scale
from data_pipeline.config import BuildConfig
from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import find_recipe, load, to_yaml
from ponder_scale.setup.build import model_class, model_configuration
from ponder_scale.train.zero.deepspeed_config import deepspeed_config, read_sharding

TRAINING = Path(ponder_scale.__path__[0]) / "recipes"
DATA = Path(data_pipeline.__path__[0]) / "recipes"


@pytest.mark.parametrize("path", sorted(TRAINING.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_training_recipe_builds_its_model(path: Path, tmp_path: Path) -> None:
    config = load(RunConfig, path)
    configuration = model_configuration(config.model, vocab_size=1000, seq_len=config.data.seq_len, eod_id=0)
    with torch.device("meta"):
        model = model_class(configuration)(configuration)
    assert model.config.pondering_steps == config.model.pondering_steps
    deepspeed_config(read_sharding(config.train.deepspeed), config.train, config.optim, world_size=1)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(RunConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", sorted(DATA.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_data_recipe_loads(path: Path) -> None:
    overrides = ["tokenizer=t", "out=o", "sources.stdlib.path=p"]
    assert load(BuildConfig, path, overrides).sources


def test_a_recipe_is_found_by_name_or_path_and_its_absence_lists_the_others(tmp_path: Path) -> None:
    assert find_recipe("quickstart", TRAINING) == TRAINING / "quickstart.yaml"
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    assert find_recipe(str(tmp_path / "mine.yaml"), TRAINING) == tmp_path / "mine.yaml"
    with pytest.raises(ConfigError, match=r"recipe fast: no such file; .*quickstart"):
        find_recipe("fast", TRAINING)


def test_a_recipe_begins_with_its_base_and_changes_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/common.yaml").write_text(
        "seed: 5\ndata: {seq_len: 64, sources: {web: {path: shards/web}}}\noptim: {lr: 1e-3, warmup_steps: 7}\n"
    )
    (tmp_path / "mine.yaml").write_text("base: base/common.yaml\noptim: {lr: 2e-3}\n")
    (tmp_path / "mine-on-code.yaml").write_text("base: mine.yaml\ndata: {sources: {code: {path: shards/code}}}\n")
    config = load(
        RunConfig, tmp_path / "mine-on-code.yaml", ["seed=6", "run_dir=r", "train.steps=9", "train.global_batch=8"]
    )
    assert (config.seed, config.optim.lr, config.optim.warmup_steps, config.data.seq_len) == (6, 2e-3, 7, 64)
    assert set(config.data.sources) == {"code"}  # a mapping of named entries is set as a whole, as by an override


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("base: none.yaml\n", r"mine.yaml, line 1: base is none.yaml; there is no file .*none.yaml"),
        ("base: mine.yaml\n", r"base is mine.yaml, which is based on this recipe"),
        ("base: between.yaml\n", r"between.yaml, line 1: base is mine.yaml, which is based on this recipe"),
        ("base: [a, b]\n", r"base is a list; expected the file of another recipe"),
        ("base:\n", r"base is null; expected the file of another recipe"),
    ],
)
def test_a_base_that_cannot_be_is_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "between.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(ConfigError, match=match):
        load(RunConfig, tmp_path / "mine.yaml")
