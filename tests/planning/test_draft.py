"""`ponder-scale init`: what it finds in shards, and that its recipe trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import RunConfig, load_recipe
from ponder_scale.planning.draft import NEXT, _shape, draft, source_names
from ponder_scale.settings import known_keys
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.shards.format import ShardSet
from tests.commands import run_command


def written(folder: Path, sources: dict[str, ShardSet], **options: Any) -> Path:
    made = draft(sources, **{"pondering_steps": 2, "gpu": False, "run_dir": str(folder / "run"), **options})
    file = folder / "recipe.yaml"
    file.write_text(made.text)
    return file


def test_a_recipe_fits_the_shards_and_says_what_each_key_does(tiny_shards: Any, tmp_path: Path) -> None:
    sources = {"a": tiny_shards(train=(9000, 7000)), "b": tiny_shards(train=(4000,), seed=1)}
    file = written(tmp_path, sources)
    config = load_recipe(str(file))
    tokens = {name: sum(shard.info.tokens for shard in shards.split("train")) for name, shards in sources.items()}
    assert {name: source.weight for name, source in config.data.sources.items()} == tokens
    assert config.train.steps == sum(tokens.values()) // (config.train.global_batch * config.data.seq_len) > 0
    assert (config.model.pondering_steps, config.train.precision, config.data.packing) == (2, "fp32", "concat")
    assert load_recipe(str(written(tmp_path, sources, gpu=True))).train.precision == "bf16"
    helps = {key: item.metadata["help"] for key, _, item in known_keys(RunConfig)}
    lines = file.read_text().splitlines()
    for key in (
        "run_dir",
        "model.hidden_size",
        "train.steps",
        "optim.lr",
        *(f"{g}.{k}" for g, ks in NEXT.items() for k in ks),
    ):
        (place,) = [n for n, line in enumerate(lines) if re.match(rf" *(# )?{key.rpartition('.')[2]}: ", line)]
        assert lines[place - 1].strip() == f"# {helps[key]}"


def test_the_keys_behind_a_comment_have_their_defaults(tiny_shards: Any, tmp_path: Path) -> None:
    file = written(tmp_path, {"a": tiny_shards(train=(9000,))})
    before = load_recipe(str(file))
    names = "|".join(name for names in NEXT.values() for name in names) + "|evaluate|health|log"
    text, count = re.subn(rf"^( *)# ((?:{names}):)", r"\1\2", file.read_text(), flags=re.MULTILINE)
    assert count > sum(map(len, NEXT.values()))
    file.write_text(text)
    assert load_recipe(str(file)) == before


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(10_500_000, 2048, 64), (26_000_000_000, 50304, 1792)])
def test_the_model_is_the_largest_with_twenty_tokens_a_parameter(tokens: int, vocabulary: int, width: int) -> None:
    found, layers, parameters = _shape(tokens, vocabulary)
    assert found == width and parameters <= tokens / 20
    if vocabulary < 10_000:  # counted in the model itself
        overrides = [f"model.hidden_size={width}", f"model.num_hidden_layers={layers}", "model.num_attention_heads=1"]
        overrides += ["model.intermediate_size=176", f"model.vocab_size={vocabulary}"]
        config = load_recipe("quickstart", [*overrides, "model.num_key_value_heads=null"])
        model = build_model(model_configuration(config.model, vocab_size=vocabulary, seq_len=64, eod_id=0), seed=0)
        assert parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_command_writes_a_recipe_that_trains(tiny_tokenizer: Path, tmp_path: Path) -> None:
    texts = [
        json.dumps({"text": f"{number} quick brown foxes jump over {number + 1} lazy dogs"}) for number in range(400)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    words = ["sources.a.kind=jsonl", "sources.a.path=texts.jsonl", f"tokenizer={tiny_tokenizer}", "out=shards"]
    assert run_command("ponder-data", "build", *words, folder=tmp_path).returncode == 0
    done = run_command("ponder-scale", "init", "shards", "--run-dir", "run", folder=tmp_path)
    assert done.returncode == 0 and "next: ponder-scale plan recipe.yaml" in done.stdout, done.stdout + done.stderr
    before = (tmp_path / "recipe.yaml").read_text()
    done = run_command("ponder-scale", "init", "shards", folder=tmp_path)
    assert done.returncode == 2 and "--out recipe.yaml exists already; name another file" in done.stderr
    assert (tmp_path / "recipe.yaml").read_text() == before
    done = run_command("ponder-scale", "train", "recipe.yaml", "train.steps=2", folder=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "checkpoints").is_dir(), done.stdout[-2000:] + done.stderr


def test_what_no_recipe_can_be_made_of_is_refused(tiny_shards: Any, tmp_path: Path) -> None:
    for words, said in (
        ([tmp_path], "manifest.json"),
        ([tiny_shards().folder], "expected at least 2,048, one training step of 8 sequences"),
    ):
        done = run_command("ponder-scale", "init", *words, folder=tmp_path)
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "recipe.yaml").exists(), done.stderr


def test_sources_are_called_as_their_folders(tmp_path: Path) -> None:
    folders = [tmp_path / "one/shards", tmp_path / "two/shards", tmp_path / "code"]
    assert list(source_names(folders)) == ["one-shards", "two-shards", "code"]
    with pytest.raises(Exception, match="given twice"):
        source_names([folders[0], tmp_path / "two/../one/shards"])
