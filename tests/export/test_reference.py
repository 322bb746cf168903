"""Folders of the published code: imported they compute what it computes, exported again they are what they were."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ponder_scale.errors import CheckpointError
from ponder_scale.export.folder import write_folder
from ponder_scale.export.reference import export_reference, import_reference
from ponder_scale.setup.warm_start import pondering_fields
from tests.commands import run_command
from tests.export.published import NAMES, published_folder
from tests.model.architectures import make
from tests.model.published import CASES, ORACLE


@pytest.mark.parametrize("pytorch", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_imported_folder_gives_the_published_logits(name: str, pytorch: bool, tmp_path: Path) -> None:
    source = published_folder(tmp_path / "theirs", name, pytorch=pytorch)
    folder = import_reference(source, tmp_path / f"ours-{name.replace('.', '-')}", licence="mit")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = load_file(ORACLE / "inputs.safetensors")
    with torch.no_grad():
        output = model(inputs[CASES[name]["input"]], labels=inputs[CASES[name]["labels"]])
    expected = load_file(ORACLE / CASES[name]["file"])[f"{name}/logits"]
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=0)
    assert output.loss.item() == pytest.approx(CASES[name]["loss"], abs=1e-6, rel=2e-7)
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "imported from | theirs" in card


@pytest.mark.parametrize("name", NAMES)
def test_import_and_export_give_the_published_folder_back(name: str, tmp_path: Path) -> None:
    source = published_folder(tmp_path / "theirs", name)
    back = export_reference(import_reference(source, tmp_path / "ours"), tmp_path / "back")
    got, expected = (load_file(folder / "model.safetensors") for folder in (back, source))
    expected.pop("adapter.weight", None)
    assert got.keys() - {"adapter.weight"} == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    if "gpt_neox" in name:
        assert got["adapter.weight"].shape == (64, 128)  # the published class has the parameter and never uses it
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    assert ours["model_type"] == theirs["model_type"] and "auto_map" not in ours
    assert pondering_fields(ours) == pondering_fields(theirs) | {
        key: value for key, value in pondering_fields(ours).items() if "vanilla" in name
    }
    assert {key: ours[key] for key in ("vocab_size", "tie_word_embeddings")} == {
        key: theirs[key] for key in ("vocab_size", "tie_word_embeddings")
    }


def test_extra_heads_are_left_out_of_the_published_format_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(pondering_steps=2, scale_embeds=True, extra_heads=2)
    weights = dict(model.named_parameters())
    write_folder(tmp_path / "ours", model.config, weights.items(), dtype="float32", card=str, tokenizer=None)
    back = export_reference(tmp_path / "ours", tmp_path / "theirs")
    assert "its 2 extra heads are left out, because the published code has none" in caplog.text
    assert load_file(back / "model.safetensors").keys() == {name for name in weights if "extra_heads" not in name}
    assert "extra_heads" not in json.loads((back / "config.json").read_text())
    again = import_reference(tmp_path / "ours", tmp_path / "again")
    assert load_file(again / "model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize("name", ["latent_llama.K1.R3", "latent_gpt_neox.K3.R2"])
def test_a_folder_of_latents_gives_the_published_logits_once_it_is_said_what_it_is(name: str, tmp_path: Path) -> None:
    """PonderLM-2, its looped and its pause baseline write the same keys and the same weights."""
    source = published_folder(tmp_path / "theirs", name)
    with pytest.raises(
        CheckpointError, match="interpolation is false, as PonderLM-2 writes it, and its loop and pause"
    ):
        import_reference(source, tmp_path / "ours")
    run_command("ponder-scale", "import-reference", source, tmp_path / "ours", "--latent")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True).eval()
    inputs, refinements = load_file(ORACLE / "inputs.safetensors"), CASES[name]["settings"]["num_jacobi_iterations"]
    with torch.no_grad():
        output = model(inputs["input_ids"], labels=inputs["labels"], refinements=refinements)
    expected = load_file(ORACLE / CASES[name]["file"])[f"{name}/logits"]
    torch.testing.assert_close(output.logits, expected, atol=2e-5, rtol=0)
    assert output.loss.item() == pytest.approx(CASES[name]["loss"], abs=1e-6, rel=2e-7)
    with pytest.raises(CheckpointError, match="feedback is 'latent', which the published"):
        export_reference(tmp_path / "ours", tmp_path / "back")


def test_temperature_is_read_where_the_published_code_reads_it() -> None:
    keys = {"ponderinglm": True, "pondering_steps": 2, "softmax_temperature": 0.5}
    assert pondering_fields({**keys, "model_type": "llama"})["pondering_temperature"] == 0.5
    assert pondering_fields({**keys, "model_type": "gpt_neox"})["pondering_temperature"] == 1.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; expected one of llama, gpt_neox, gpt2"),
        ({"num_latent_thoughts": 2}, "latent thoughts as extra positions make another model"),
        (
            {"num_latent_thoughts": 2, "model_type": "gpt_neox", "recurrent_model": True},
            "adds hidden states, which cannot",
        ),
        ({"pondering_steps": 0, "mutiply_pondering_steps": True}, "multiplies the embeddings by 0"),
        ({"hidden_size": 32}, "use weights of the same architecture and size"),
        ({"num_hidden_layers": 3}, "no weight for model.layers.2"),
    ],
)
def test_what_cannot_be_imported_is_answered(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = published_folder(tmp_path / "theirs", NAMES[0], **keys)
    with pytest.raises(CheckpointError, match=message):
        import_reference(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".making*"))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gpt_neox.S1.scale1.mult0", "residual", "restart"),
        ("gpt_neox.S1.scale1.mult0", "pondering_temperature", 0.5),
        ("llama.S3.scale1.mult1", "residual", "replace"),
        ("llama.S3.scale1.mult1", "feedback", "hidden"),
        ("llama.S3.scale1.mult1", "halting", "gate"),
        ("llama.S3.scale1.mult1", "initial_scale", 2.0),
        ("llama.S3.scale1.mult1", "pondering_top_k", 4),
    ],
)
def test_what_the_published_code_cannot_express_is_refused(name: str, field: str, value: Any, tmp_path: Path) -> None:
    ours = import_reference(published_folder(tmp_path / "theirs", name), tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(CheckpointError, match=f"{field} is .*cannot express"):
        export_reference(ours, tmp_path / "back")


def test_the_commands_convert_and_answer_in_one_line(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "theirs", NAMES[0])

    def run(*words: Any) -> subprocess.CompletedProcess[str]:
        return run_command("ponder-scale", *words)

    assert "S = 3, 115,008 parameters" in run("import-reference", source, tmp_path / "ours").stdout
    assert run("export-reference", tmp_path / "ours", tmp_path / "back").returncode == 0
    refused = run("export-reference", source, tmp_path / "other")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: ") and "expected one of ponder_llama" in refused.stderr
