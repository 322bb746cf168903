"""Exported weights are the engine's own, bit for bit, from every ZeRO stage.

Answers: exported weights that are not those of the checkpoint (GPT-NeoX 485).
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ponder_scale.checkpoint.find import find
from ponder_scale.checkpoint.parts import Parts
from ponder_scale.checkpoint.weights import read_weights
from ponder_scale.errors import CheckpointError
from ponder_scale.export.card import trained_card
from ponder_scale.export.folder import write_folder
from ponder_scale.export.huggingface import export
from ponder_scale.export.tokenizer import bundle_tokenizer
from ponder_scale.export.universal import export_universal
from ponder_scale.export.verify import verify_in_fresh_process
from ponder_scale.setup.build import ARCHITECTURES
from tests.checkpoint.sealing import seal
from tests.commands import run_command
from tests.export.checkpoints import save_checkpoint
from tests.model.architectures import TINY, make
from tests.ranks import run_ranks
from tests.train.zero.gradients import small_buckets

MODELS = {  # one for each stage, so that every architecture and tying is met
    0: ("gpt2", True, "fp32"),
    1: ("gpt_neox", False, "bf16"),
    2: ("llama", True, "bf16"),
    3: ("olmo2", False, "fp32"),
}


def case(folder: Path, stage: int, tokenizer: Path, **more: Any) -> dict[str, Any]:
    architecture, tied, precision = MODELS[stage]
    overrides = [f"model.architecture={architecture}", f"optim.ema={'0.5' if stage == 3 else 'null'}"]
    if "num_key_value_heads" in ARCHITECTURES[architecture].names:  # it has none
        overrides.append("model.num_key_value_heads=null")
    feedback = {0: "pause", 2: "latent", 3: "both"}.get(stage, "embedding")
    overrides.append(f"model.feedback={feedback}")
    (folder / "settings").mkdir(exist_ok=True)
    values = {"policy": "none", "tied": tied, "precision": precision, "overrides": overrides, "steps": 2}
    sharding = small_buckets(folder / "settings", stage)
    return {
        **values,
        "deepspeed": sharding,
        "run_dir": str(folder / f"run{stage}"),
        "tokenizer": str(tokenizer),
        **more,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    cases = [case(folder, stage, tiny_tokenizer, universal=stage >= 2) for stage in MODELS]
    for ranks in run_ranks(save_checkpoint, cases):
        assert all("error" not in rank for rank in ranks), ranks
    return {stage: folder / f"run{stage}" for stage in MODELS}


@pytest.mark.parametrize("stage", MODELS)
def test_an_export_holds_the_engine_s_weights(stage: int, runs: dict[int, Path], tmp_path: Path) -> None:
    folder = export(runs[stage], tmp_path / "out", licence="apache-2.0")
    got, expected = load_file(folder / "model.safetensors"), torch.load(runs[stage] / "expected.pt")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    half = load_file(export(runs[stage], tmp_path / "half", dtype="bfloat16") / "model.safetensors")
    assert all(torch.equal(half[name], expected[name].bfloat16()) for name in expected)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("OK") == len(list(folder.iterdir())) - 1
    card = (folder / "README.md").read_text()
    assert MODELS[stage][0] in card and "f" * 32 in card and "license: apache-2.0" in card and "any 100.0%" in card


def test_a_folder_that_computes_something_else_is_not_verified(runs: dict[int, Path], tmp_path: Path) -> None:
    folder = export(runs[2], tmp_path / "out")
    verify_in_fresh_process(runs[2], folder, dtype="float32")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for value in (0.5, math.nan):
        changed = weights[name].clone()
        changed[0, 0] = value
        save_file({**weights, name: changed}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match="its outputs differ from those of checkpoint"):
            verify_in_fresh_process(runs[2], folder, dtype="float32")


def test_a_learned_gate_is_exported_and_verified_in_a_fresh_process(runs: dict[int, Path], tmp_path: Path) -> None:
    folder = export(runs[3], tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    assert weights["hidden_gate.weight"].abs().min() > 0
    verify_in_fresh_process(runs[3], folder, dtype="float32")
    assert "learned gate" in (folder / "README.md").read_text()


def test_weights_that_overflow_are_not_verified(runs: dict[int, Path], tmp_path: Path) -> None:
    source = shutil.copytree(find(runs[2]), tmp_path / "checkpoint")
    stretch = Parts(source).table["weight/model.layers.0.mlp.up_proj.weight"][0]
    with (source / stretch.file).open("rb+") as file:
        file.seek(stretch.offset)
        file.write(struct.pack("<f", 1e6))
    folder = export(seal(source), tmp_path / "out", dtype="float16")
    with pytest.raises(CheckpointError, match=r"some logits are not finite .* in float16; .* export as bfloat16 or"):
        verify_in_fresh_process(source, folder, dtype="float16")


def test_an_export_of_the_average_has_its_weights_and_says_so(runs: dict[int, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[3], tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"event": "evaluation", "step": 2, "losses": [3.25], "tokens": 7}\n')
    folder = export(run, tmp_path / "out", average=True)
    got, weights = load_file(folder / "model.safetensors"), torch.load(run / "expected.pt")
    average = dict(read_weights(find(run), average=True))
    assert all(torch.equal(got[name], average[name]) for name in weights)
    assert not all(torch.equal(got[name], weights[name]) for name in weights)
    card = (folder / "README.md").read_text()
    assert "| weights | running average over training, decay 0.5 |" in card
    assert "pass 0: 3.2500 (25.79), at step 2, with the weights of that step and not their average |" in card


@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint_exports_to_the_engine_s_weights(
    stage: int, runs: dict[int, Path], tmp_path: Path
) -> None:
    like = export(runs[stage], tmp_path / "like")
    folder = export_universal(runs[stage] / "universal", tmp_path / "out", like=like)
    got, expected = load_file(folder / "model.safetensors"), torch.load(runs[stage] / "expected.pt")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    ours, theirs = (json.loads((made / "config.json").read_text()) for made in (folder, like))
    assert ours == theirs and (folder / "tokenizer.json").is_file()
    assert "| converted from | universal, a universal checkpoint of DeepSpeed |" in (folder / "README.md").read_text()


def test_the_command_verifies_a_universal_checkpoint_and_asks_for_its_model(
    runs: dict[int, Path], tmp_path: Path
) -> None:
    def run(*words: Any) -> subprocess.CompletedProcess[str]:
        return run_command("ponder-scale", "export", *words)

    universal, like = runs[2] / "universal", export(runs[2], tmp_path / "like")
    done = run(universal, tmp_path / "out", "--like", like, "--verify")
    assert done.returncode == 0 and "cached decoding equals uncached" in done.stdout + done.stderr
    for words, message in (
        ((universal, tmp_path / "other"), "a universal checkpoint needs --like"),
        ((runs[2], tmp_path / "other", "--like", like), "--like is only for universal checkpoints"),
        (
            (universal, tmp_path / "other", "--like", export(runs[3], tmp_path / "wrong")),
            "use weights of the same architecture and size",
        ),
    ):
        refused = run(*words)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and message in refused.stderr
    assert not (tmp_path / "other").exists()


def test_the_card_tells_the_losses_of_a_record_that_a_crash_has_torn(runs: dict[int, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[3], tmp_path / "run")
    evaluation = {"event": "evaluation", "step": 2, "losses": [3.25, None], "tokens": 7}
    (run / "metrics.jsonl").write_text(json.dumps(evaluation) + '\n{"event":"evaluation","st')
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "pass 0: 3.2500 (25.79), pass 1: not finite, at step 2 |" in card
    assert "| weights | of the last step |" in card and "| commit | not recorded |" in card
    state = json.loads((find(run) / "state.json").read_text())
    card = trained_card("mine", {**state, "commit": "c" * 40}, None, 1, None)
    assert f"| commit | {'c' * 40} |" in card and "| held-out loss (perplexity) | not evaluated |" in card


@pytest.mark.parametrize(("end", "token"), [(None, None), ([1, 0], "!"), (1, "!")])
def test_an_end_that_a_configuration_names_in_any_way_is_written_down(
    end: Any, token: str | None, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "from").mkdir()
    shutil.copy(tiny_tokenizer / "tokenizer.json", tmp_path / "from")
    bundle_tokenizer(tmp_path / "from", tmp_path, eod_id=end)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == token
    (tmp_path / "from/tokenizer_config.json").write_text('{"eos_token": "#"}')
    bundle_tokenizer(tmp_path / "from", tmp_path, eod_id=end)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "#"


def test_hugging_face_to_training_and_back_is_bit_exact(tiny_tokenizer: Path, tmp_path: Path) -> None:
    cases = {}
    for stage in MODELS:
        settings = case(tmp_path, stage, tiny_tokenizer, steps=0, precision="fp32")
        settings["overrides"] += ["model.scale_embeds=false", "model.feedback=embedding"]  # stock, without a gate
        settings["init"] = str(stock_folder(settings, tmp_path / f"start{stage}"))
        cases[stage] = settings
    for stage, ranks in zip(cases, run_ranks(save_checkpoint, list(cases.values())), strict=True):
        assert all("error" not in rank for rank in ranks), ranks
        got = load_file(export(Path(cases[stage]["run_dir"]), tmp_path / f"out{stage}") / "model.safetensors")
        start = load_file(tmp_path / f"start{stage}/model.safetensors")
        assert got.keys() == {name.replace("embed_out", "lm_head") for name in start}
        assert all(torch.equal(got[name.replace("embed_out", "lm_head")], start[name]) for name in start)


def stock_folder(settings: dict[str, Any], folder: Path) -> Path:
    """A folder of the stock class that the run's model is made over, with other weights than it starts with."""
    from tests.train.zero.gradients import make_model, run_config

    ours = make_model(run_config(settings))
    tiny = next(tiny for tiny in TINY.values() if isinstance(ours, tiny.model))
    fields = {key: value for key, value in ours.config.to_dict().items() if key not in ("model_type", "auto_map")}
    torch.manual_seed(11)
    tiny.stock_model(tiny.stock_configuration(**fields)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_our_folder_loads_as_the_stock_class(architecture: str, tmp_path: Path) -> None:
    tiny, model = TINY[architecture], make(architecture, seed=2, pondering_steps=2)
    folder = write_folder(
        tmp_path / "ours", model.config, model.named_parameters(), dtype="float32", card=str, tokenizer=None
    )
    assert folder == sum(parameter.numel() for parameter in model.parameters())
    stock = tiny.stock_model.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in stock.state_dict().items())


def test_weights_of_another_model_are_refused_and_nothing_is_left(runs: dict[int, Path], tmp_path: Path) -> None:
    source = find(runs[3])
    shutil.copytree(source, tmp_path / "checkpoint")
    state = json.loads((source / "state.json").read_text())
    state["model"]["intermediate_size"] = 48
    (tmp_path / "checkpoint/state.json").write_text(json.dumps(state))
    seal(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="but the model to write has"):
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
