"""Code of an exported folder runs only where the user asks for it; folders of ours need none of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ponder_scale.errors import CheckpointError
from ponder_scale.evaluate.decoding import measure
from ponder_scale.evaluate.generate import generate, load_folder
from ponder_scale.evaluate.perplexity import evaluate
from ponder_scale.evaluate.tasks import evaluate_tasks
from ponder_scale.evaluate.trace import trace_folder
from ponder_scale.export.reference import import_reference
from ponder_scale.model.modeling import PonderLlamaForCausalLM
from tests.commands import run_command
from tests.faults import Fault


@pytest.fixture
def theirs(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "theirs"))


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))


def bomb(path: Path, marker: Path, head: str = "") -> None:
    """Python that leaves a file when it is imported."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{head}\nfrom pathlib import Path\nPath({str(marker)!r}).touch()\n")


def changed_code(folder: Path, marker: Path) -> None:
    bomb(folder / "modeling.py", marker, head=(folder / "modeling.py").read_text())


def other_class(folder: Path, marker: Path) -> None:
    bomb(folder / "evil.py", marker, head="from .modeling import PonderLlamaForCausalLM")
    maps = json.loads((folder / "config.json").read_text())["auto_map"]
    edit(folder / "config.json", auto_map={**maps, "AutoModelForCausalLM": "evil.PonderLlamaForCausalLM"})


def other_repository(folder: Path, marker: Path) -> None:
    maps = json.loads((folder / "config.json").read_text())["auto_map"]
    edit(folder / "config.json", auto_map={**maps, "AutoConfig": f"somebody/else--{maps['AutoConfig']}"})


def own_tokenizer(folder: Path, marker: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling.PonderLlamaForCausalLM"]})


def file_besides(folder: Path, marker: Path) -> None:
    bomb(folder / "custom_generate/generate.py", marker)


def no_code(folder: Path, marker: Path) -> None:
    (folder / "cache.py").unlink()


def stock_type(folder: Path, marker: Path) -> None:
    edit(folder / "config.json", model_type="llama")


def an_adapter(folder: Path, marker: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


CASES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "changed code": (changed_code, "modeling.py differs from that of this installation"),
    "a class of another file": (other_class, "auto_map in its config.json is"),
    "a class of another repository": (other_repository, "auto_map in its config.json is"),
    "a tokenizer with code": (own_tokenizer, "its tokenizer_config.json has an auto_map"),
    "a generation with code": (file_besides, "custom_generate/generate.py was added to its code"),
    "code that is missing": (no_code, "cache.py is missing from its code"),
    "a stock type": (stock_type, "its model_type is 'llama'"),
    "an adapter": (an_adapter, "it has an adapter"),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_is_not_of_our_making_asks_before_its_code_runs(
    name: str, theirs: Path, shards: tuple[Path, Path], tmp_path: Path, fault: Fault
) -> None:
    change, reason = CASES[name]
    change(theirs, tmp_path / "ran")
    data = {"a": shards[0]}
    for load in (
        lambda: generate(theirs, "The", max_new_tokens=1),
        lambda: trace_folder(theirs, "The", steps=None, html_file=None),
        lambda: evaluate(theirs, data, sequences=1),
        lambda: measure(theirs, data, sequences=1),
        lambda: evaluate_tasks(theirs, ["piqa"]),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        message = str(caught.value)
        assert reason in message and "--trust-remote-code" in message and "\n" not in message
    assert not (tmp_path / "ran").exists()
    fault(f"folder with {name}", "generate, evaluate", detected="its code is not ours", after="refused", lost="nothing")


def test_the_flag_lets_the_code_run_and_the_code_of_the_test_is_real(theirs: Path, tmp_path: Path) -> None:
    changed_code(theirs, tmp_path / "ran")
    command = ("ponder-scale", "generate", theirs, "--prompt", "The", "--max-new-tokens", "1")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    refused = run_command(*command, **environment)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not (tmp_path / "ran").exists()
    done = run_command(*command, "--trust-remote-code", **environment)
    assert done.returncode == 0 and (tmp_path / "ran").exists(), done.stderr


def test_a_folder_of_ours_is_loaded_by_the_installed_classes_to_what_its_own_code_gives(folder: Path) -> None:
    model, tokenizer = load_folder(folder)
    assert type(model) is PonderLlamaForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(theirs) is not PonderLlamaForCausalLM and model.dtype == theirs.dtype
    ids = tokenizer("The quick brown", return_tensors="pt").input_ids
    assert torch.equal(
        ids,
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("The quick brown", return_tensors="pt").input_ids,
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), theirs.generate(ids, **options))
    assert model.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_an_import_makes_a_folder_of_another_version_one_of_ours(theirs: Path, folder: Path, tmp_path: Path) -> None:
    changed_code(theirs, tmp_path / "ran")
    ours, _ = load_folder(import_reference(theirs, tmp_path / "ours"))
    expected, _ = load_folder(folder)
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in expected.state_dict().items())
    assert ours.config.pondering_steps == expected.config.pondering_steps == 2 and ours.config.scale_embeds


def test_what_a_configuration_says_cannot_reach_the_loader(theirs: Path) -> None:
    edit(theirs / "config.json", attn_implementation="somebody/kernel", to_dict=None, custom_pipelines={"a": {}})
    model, _ = load_folder(theirs)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "custom_pipelines")
    for content in ("[]", "{", "[" * 10**5):
        (theirs / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config.json: "):
            load_folder(theirs)
