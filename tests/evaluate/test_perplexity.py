"""Held-out losses by pondering steps and source, against the loss of plain torch on the same tokens."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ponder_scale.config import DataConfig, SourceConfig
from ponder_scale.data.heldout import HeldOut
from ponder_scale.data.loader import heldout_batches, open_sources
from ponder_scale.errors import CheckpointError, ConfigError, ShardError, TokenizerError
from ponder_scale.evaluate import generate, perplexity
from ponder_scale.evaluate.perplexity import Sweep, evaluate, parse_sources, trajectory
from ponder_scale.shards.packing import pack
from tests.commands import run_command

POSITIONS = 32  # that the model of the folder has


def by_hand(model: Any, folder: Path, steps: int, sequences: int) -> float:
    """The mean loss of a forward of `steps` steps, one sequence at a time."""
    config = DataConfig({"x": SourceConfig(str(folder))}, POSITIONS)
    losses = []
    for tokens, _, _ in heldout_batches(config, open_sources(config), sequences=sequences, micro_batch=1):
        with torch.no_grad():
            logits = model(tokens[:, :-1], pondering_steps=steps).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).item())
    return float(np.mean(losses))


def predicted(folder: Path, sequences: int) -> list[list[int]]:
    """The labels of the held-out sequences."""
    config = DataConfig({"x": SourceConfig(str(folder))}, POSITIONS)
    batches = heldout_batches(config, open_sources(config), sequences=sequences, micro_batch=1)
    return [batch.tokens[0, 1:].tolist() for batch in batches]


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_each_number_of_steps_has_the_loss_of_its_own_forward(
    model: Any, folder: Path, shards: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"json_file": tmp_path / "losses.json", "plot_file": tmp_path / "losses.svg"}
    swept = evaluate(folder, {"first": shards[0], "second": shards[1]}, sequences=6, steps=4, **files)
    assert list(swept.sources) == ["first", "second", "all"]
    for name, source in (("first", shards[0]), ("second", shards[1])):
        expected = [by_hand(model, source, steps, 6) for steps in range(5)]
        assert swept.sources[name].losses == pytest.approx(expected, rel=1e-5)
    first, second, both = swept.sources.values()
    assert both.tokens == first.tokens + second.tokens
    mean = (first.losses[2] * first.tokens + second.losses[2] * second.tokens) / both.tokens
    assert both.losses[2] == pytest.approx(mean)
    size = 0
    for tokens in (row for source in shards for row in predicted(source, 6)):
        # as it writes them in its own alphabet, where each letter is a byte; 0 ends documents
        size += sum(len(tokenizer_of(folder).id_to_token(token)) for token in tokens if token)
    assert both.bytes == size and both.bits_per_byte is not None
    assert both.bits_per_byte[2] == pytest.approx(both.losses[2] / math.log(2) * both.tokens / size)
    printed = capsys.readouterr().out
    values = f"perplexity {both.perplexities[2]:.2f}, {both.bits_per_byte[2]:.4f} bits per byte, as trained"
    assert f"pass 2: loss {both.losses[2]:.4f}, {values}" in printed
    content = json.loads(files["json_file"].read_text())
    assert content["sources"]["all"]["bits_per_byte"] == both.bits_per_byte and content["no_bytes"] is None
    assert content["trained"] == 2 and content["sources"]["all"]["losses"] == both.losses
    lines = ET.parse(files["plot_file"]).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [5, 5, 5]


def test_under_a_document_mask_each_document_is_read_alone(
    model: Any, folder: Path, shards: tuple[Path, Path], tmp_path: Path
) -> None:
    config = DataConfig({"x": SourceConfig(str(shards[0]))}, POSITIONS)
    sources = open_sources(config)
    (shard,) = sources["x"].split("heldout")
    starts = {0, *(shard.offsets // 2).tolist()}
    total, count = 0.0, 0
    for begin in range(0, shard.info.tokens - POSITIONS, POSITIONS):
        cuts = sorted({begin, begin + POSITIONS, *(s for s in starts if begin < s < begin + POSITIONS)})
        for first, end in pairwise(cuts):
            tokens = torch.tensor(shard.tokens[first : end + 1].astype(np.int64)).unsqueeze(0)
            with torch.no_grad():
                logits = model(tokens[:, :-1]).logits
            total += torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
            count += end - first
    masked = tmp_path / "masked.json"
    options = ["--data", f"x={shards[0]}", "--json", masked, "--document-mask"]
    done = run_command("ponder-scale", "evaluate", "ppl", folder, *options)
    assert done.returncode == 0, done.stderr
    (losses,) = (source["losses"] for source in json.loads(masked.read_text())["sources"].values())
    assert losses[2] == pytest.approx(total / count, rel=1e-5)
    plain = evaluate(folder, {"x": shards[0]}, sequences=256)
    assert plain.sources["x"].losses[2] != pytest.approx(losses[2], rel=1e-4)


def test_what_cannot_be_evaluated_is_answered(folder: Path, shards: tuple[Path, Path], tiny_shards: Any) -> None:
    with pytest.raises(TokenizerError, match="evaluate on shards that were made with the model's own tokenizer"):
        evaluate(folder, {"other": tiny_shards().folder}, sequences=2)
    with pytest.raises(ShardError, match=r"no held-out sequence of 1000 tokens; lower --seq-len"):
        evaluate(folder, {"first": shards[0]}, sequences=2, seq_len=1000)
    with pytest.raises(ConfigError, match="--steps is -1; expected at least 0"):
        evaluate(folder, {"first": shards[0]}, sequences=2, steps=-1)
    with pytest.raises(CheckpointError, match=r"no config\.json in it"):
        evaluate(shards[0], {"first": shards[0]}, sequences=2)
    with pytest.raises(CheckpointError, match="expected a run folder"):
        trajectory(folder, {"first": shards[0]}, sequences=2)


def test_sources_are_named_by_their_folder_or_as_asked() -> None:
    assert parse_sources(["data/pile", "web=data/cc"]) == {"pile": Path("data/pile"), "web": Path("data/cc")}
    with pytest.raises(ConfigError, match="'pile' names another source already; give it as NAME=other/pile"):
        parse_sources(["data/pile", "other/pile"])


@pytest.fixture(scope="module")
def trained(tiny_shards: Any, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that has evaluated itself and kept its checkpoints, and its shards."""
    from ponder_scale.shards.manifest import tokenizer_sha256

    tmp_path = tmp_path_factory.mktemp("trained")
    made = tiny_shards(vocab_size=300, tokenizer=tokenizer_sha256([tiny_tokenizer / "tokenizer.json"]))
    (made.folder / "tokenizer").mkdir(exist_ok=True)
    for file in tiny_tokenizer.iterdir():
        (made.folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    settings = [
        *(f"run_dir={tmp_path / 'run'}", f"data.sources.a.path={made.folder}", "data.seq_len=16"),
        *("model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2"),
        *("model.num_attention_heads=4", "model.pondering_steps=1", "train.precision=fp32", "train.steps=4"),
        *("train.global_batch=4", "checkpoint.every_steps=2", "evaluate.every_steps=2", "evaluate.sequences=8"),
        *("train.deepspeed=zero1", "optim.lr=3e-3", "data.packing=best-fit", "data.document_mask=true"),
    ]
    pack(made, 16)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\n")
    done = run_command("ponder-scale", "train", recipe, *settings)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return tmp_path / "run", made.folder


def test_a_trajectory_has_the_losses_that_the_run_itself_found(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, shards = trained
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["losses"] for line in lines if line["event"] == "evaluation"}
    plot = tmp_path / "run.svg"
    swept = trajectory(run, {"a": shards}, sequences=8, plot_file=plot)
    assert swept.keys() == expected.keys() == {2, 4}
    for step, losses in expected.items():
        assert swept[step].sources["a"].losses == pytest.approx(losses, rel=1e-5)
    assert "a, pass 1" in plot.read_text()


def test_a_run_is_evaluated_on_the_device_of_the_other_commands(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def swept(model: Any, *_: Any, **__: Any) -> Sweep:
        devices.append(model.device.type)
        return Sweep(1, {"a": HeldOut([1.0, 1.0], 1)})

    monkeypatch.setattr(generate, "default_device", lambda: "meta")
    monkeypatch.setattr(perplexity, "sweep", swept)
    trajectory(trained[0], {"a": trained[1]}, sequences=8)
    assert devices == ["meta", "meta"]
