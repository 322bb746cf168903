"""A folder loaded by transformers alone: saved again it is itself, and older versions read it with equal logits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import ponder_scale.model
from ponder_scale.export.folder import write_folder
from ponder_scale.export.tokenizer import SAMPLES
from ponder_scale.model import compat
from tests.export import versions
from tests.export.versions import environment, newest
from tests.model.architectures import TINY, VOCABULARY, make, make_confident
from tests.ranks import REPOSITORY

# transformers and what it pins more tightly than the project; everything else is shared with this environment. The
# oldest is the oldest that model/compat.py names, 5.17.0 the oldest of pyproject.toml
VERSIONS = {
    "4.56.2": ("tokenizers==0.22.1", "huggingface_hub==0.35.3"),
    "4.57.6": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
    "5.0.0": ("tokenizers==0.22.1", "huggingface_hub==1.3.4"),
    "5.17.0": ("huggingface_hub==1.33.0",),
    "installed": (),
    "newest": (),
}

# Loads each folder named, and checks logits, losses of every pass and greedy decoding against expected.safetensors.
# Then saves it, loads that, and checks again. Its tokenizer is compared on the texts of texts.json. Decoding is with
# the usual cache, with a static one, without, and by drafts of the heads; a cache has each of its names; the backbone
# is called alone.
CHECK = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
report = {"version": transformers.__version__}

def check(folder, expected):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = expected["tokens"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        output = model(tokens, labels=tokens)
        cached = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        mask = torch.ones_like(tokens)
        decoded = [cached, model.generate(tokens, attention_mask=mask, use_cache=False, **options)]
        decoded.append(model.generate(tokens, attention_mask=mask, cache_implementation="static", **options))
        for row, said in zip(tokens, expected["greedy"]):
            by_heads = model.generate(row[None], custom_generate=model.draft_heads(), **options)
            assert torch.equal(by_heads[0], said), (by_heads, said)
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        found = [(output[key] - expected[key]).abs().max() for key in ("logits", "pass_losses")]
        found.append((model.get_output_embeddings()(hidden) - expected["logits"]).abs().max())
        found.append((model(tokens, extra_logits=True).extra_logits - expected["extra_logits"]).abs().max())
        for name in ("past_key_values", "cache"):
            cache = transformers.DynamicCache()
            model(tokens[:, :5], **{name: cache})
            rest = model(tokens[:, 5:], **{name: cache}).logits
            found.append((rest - expected["logits"][:, 5:]).abs().max())
        said = transformers.GenerationConfig(pondering_steps=1, **options)
        by_config = model.generate(tokens, attention_mask=mask, generation_config=said)
        by_name = model.generate(tokens, attention_mask=mask, pondering_steps=1, **options)
    for unknown in ("caches", "layer_past_", "pondering_step"):
        try:
            model(tokens, **{unknown: cache})
        except TypeError:
            continue
        raise AssertionError(unknown + " vanished")
    gradients = []
    model.train()
    for enabled in (False, True):  # the default of transformers 4 is reentrant
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens, multi_token_weight=1.0).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    found.append((gradients[1] - gradients[0]).abs().max() / gradients[0].abs().max())
    try:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        raise AssertionError("reentrant checkpointing is not refused")
    except ValueError:
        model.gradient_checkpointing_disable()
    model.zero_grad()
    model.eval()
    same = all(torch.equal(some, expected["greedy"]) for some in decoded) and torch.equal(by_config, by_name)
    return model, [max(found).item(), same]

for name in sys.argv[2:]:
    folder = Path(sys.argv[1], name)
    expected = load_file(Path(sys.argv[1], name + ".expected"))
    model, report[name] = check(folder, expected)
    again = Path(sys.argv[1], name + "-saved-by-" + transformers.__version__.replace(".", "-"))
    model.save_pretrained(again)
    report[name + " saved"] = check(again, expected)[1]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = json.loads(Path(sys.argv[1], "texts.json").read_text())
    assert {text: tokenizer(text)["input_ids"] for text in texts} == texts, tokenizer
    assert all(tokenizer.decode(ids) == text for text, ids in texts.items()) and tokenizer.eos_token_id == 0
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A folder of each architecture, and beside it what its model computes and how texts are encoded."""
    place = tmp_path_factory.mktemp("folders")
    # with the name of the class that this version of transformers writes, and older ones do not know
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(place / "tokenizer")
    encoder = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    (place / "texts.json").write_text(json.dumps({text: encoder.encode(text).ids for text in SAMPLES}))
    tokens = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    for name in TINY:
        rotary: dict[str, Any] = {}
        if name != "gpt2":
            rotary["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
        if name == "gpt_neox":
            rotary["rope_parameters"]["partial_rotary_factor"] = 0.5
        model = make_confident(name, pondering_steps=2, scale_embeds=True, initial_scale=2.0, extra_heads=2, **rotary)
        weights, tokenizer = model.named_parameters(), place / "tokenizer"
        write_folder(place / name, model.config, weights, dtype="float32", card=str, tokenizer=tokenizer)
        with torch.no_grad():
            output = model(tokens, labels=tokens, extra_logits=True)
            greedy = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, min_new_tokens=8
            )
        expected = {"tokens": tokens, "logits": output.logits, "pass_losses": output.pass_losses, "greedy": greedy}
        expected["extra_logits"] = output.extra_logits
        save_file(expected, place / f"{name}.expected")
    return place


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_computes_the_same_in_this_version_of_transformers(
    version: str, folders: Path, tmp_path: Path
) -> None:
    variables = {**environment(version, VERSIONS[version]), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # not in the repository, so that only the folder's own code can be found
    command = [sys.executable, "-P", "-c", CHECK, str(folders), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    number = newest() if version == "newest" else version
    print(f"transformers {number}")
    remedy = f"with transformers {number}:"
    if version == "newest" and not is_tested(number):
        remedy += f" set transformers<{number} in pyproject.toml until this passes; "
    assert done.returncode == 0, remedy + done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert number in (report.pop("version"), "installed")
    for name, (difference, same_tokens) in report.items():
        assert difference < 1e-5 and same_tokens, (remedy, name, report)
    warned = "this pondering model was tested with transformers" in done.stderr
    assert warned == (version == "newest" and not is_tested(number)), remedy + done.stderr[-1000:]


def is_tested(version: str) -> bool:
    oldest, latest = (tuple(map(int, bound.split("."))) for bound in (compat.OLDEST, compat.NEWEST))
    return oldest <= tuple(map(int, version.split(".")[:2])) <= latest


def test_the_bounds_are_those_that_are_tested() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    (bounds,) = (entry for entry in project if entry.startswith("transformers"))
    major, minor = compat.NEWEST.split(".")
    tested = [version for version in VERSIONS if version[0].isdigit()]
    assert bounds == f"transformers>={tested[-1].removesuffix('.0')},<{major}.{int(minor) + 1}"
    assert tested[0].startswith(compat.OLDEST + ".")


def test_a_version_that_cannot_be_installed_fails_its_test_unless_the_machine_is_said_to_be_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("TESTS_OFFLINE", raising=False)
    with pytest.raises(AssertionError, match=r"pip install .*without a package index: TESTS_OFFLINE=1 leaves these"):
        environment("4.56.2", VERSIONS["4.56.2"])
    monkeypatch.setenv("TESTS_OFFLINE", "1")
    with pytest.raises(pytest.skip.Exception, match="TESTS_OFFLINE is set; pip install"):
        environment("4.56.2", VERSIONS["4.56.2"])
    assert not (tmp_path / "transformers-4.56.2" / "done").exists()


def test_a_version_that_came_later_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.99.1", "6.0.0.dev0", "4.40.0"):
        compat.warn_of_untested_version.cache_clear()
        monkeypatch.setattr(compat.transformers, "__version__", version)
        with pytest.warns(UserWarning, match=f"tested with transformers .* but runs on {version}") as said:
            make(pondering_steps=1)
            make(pondering_steps=1)
        assert len([one for one in said if "was tested with" in str(one.message)]) == 1
    monkeypatch.undo()
    compat.warn_of_untested_version.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(pondering_steps=1)


def test_a_saved_folder_has_the_same_weights_and_code(folders: Path, tmp_path: Path) -> None:
    code = "import sys; from transformers import AutoModelForCausalLM as A\n"
    code += "for name in sys.argv[3:]:\n"
    code += "    model = A.from_pretrained(f'{sys.argv[1]}/{name}', trust_remote_code=True)\n"
    code += "    model.save_pretrained(f'{sys.argv[2]}/{name}')"
    variables = {**environment("installed", ()), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code, str(folders), str(tmp_path), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "deprecated" not in done.stderr
    for name in TINY:
        first, second = (load_file(folder / name / "model.safetensors") for folder in (folders, tmp_path))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        for code_file in folders.joinpath(name).glob("*.py"):
            assert (tmp_path / name / code_file.name).read_text() == code_file.read_text()
        configurations = [json.loads((folder / name / "config.json").read_text()) for folder in (folders, tmp_path)]
        assert configurations[0]["auto_map"] == configurations[1]["auto_map"]
        assert {key: value for key, value in configurations[1].items() if key in configurations[0]} == configurations[0]


def test_modeling_names_every_module_that_ships() -> None:
    # transformers up to 5.0 copies to its cache the modules that the file of the class imports itself, and no further
    code = Path(ponder_scale.model.__path__[0])
    named = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", (code / "modeling.py").read_text(), flags=re.MULTILINE))
    assert named == {path.stem for path in code.glob("*.py")} - {"modeling", "__init__"}
