"""A folder loaded by transformers alone: saved again it is itself, and older versions read it with equal logits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
from tests.model.architectures import TINY, VOCABULARY, make_confident

# transformers and what it pins more tightly than the project; everything else is shared with this environment
VERSIONS = {
    "4.56.2": ("tokenizers==0.22.1", "huggingface_hub==0.35.3"),
    "4.57.6": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
    "5.0.0": ("tokenizers==0.22.1", "huggingface_hub==1.3.4"),
    "installed": (),
}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ponder-scale-tests"

# Loads each folder named, and checks logits, losses of every pass and greedy decoding against expected.safetensors.
# Then saves it, loads that, and checks again. Its tokenizer is compared on the texts of texts.json.
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
        plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **options)
    difference = max((output[key] - expected[key]).abs().max().item() for key in ("logits", "pass_losses"))
    return model, [difference, torch.equal(cached, expected["greedy"]) and torch.equal(plain, expected["greedy"])]

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
        model = make_confident(name, pondering_steps=2, scale_embeds=True, initial_scale=2.0, **rotary)
        weights, tokenizer = model.named_parameters(), place / "tokenizer"
        write_folder(place / name, model.config, weights, dtype="float32", card=str, tokenizer=tokenizer)
        with torch.no_grad():
            output = model(tokens, labels=tokens)
            greedy = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, min_new_tokens=8
            )
        expected = {"tokens": tokens, "logits": output.logits, "pass_losses": output.pass_losses, "greedy": greedy}
        save_file(expected, place / f"{name}.expected")
    return place


def environment(version: str, requirements: tuple[str, ...]) -> dict[str, str]:
    """Variables under which Python finds this version of transformers; installed once, and kept."""
    target = CACHE / f"transformers-{version}"
    if requirements and not (target / "done").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", f"--target={target}"]
        done = subprocess.run([*command, f"transformers=={version}", *requirements], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"transformers {version} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        (target / "done").touch()
    # reading datasets without torch switches it off for this process; older transformers would obey that
    dropped = ("PYTHONPATH", "USE_TORCH", "USE_TF", "USE_JAX")
    variables = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**variables, "PYTHONPATH": str(target)} if requirements else variables


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_computes_the_same_in_this_version_of_transformers(
    version: str, folders: Path, tmp_path: Path
) -> None:
    variables = {**environment(version, VERSIONS[version]), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # not in the repository, so that only the folder's own code can be found
    command = [sys.executable, "-P", "-c", CHECK, str(folders), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert version in (report.pop("version"), "installed")
    for name, (difference, same_tokens) in report.items():
        assert difference < 1e-5 and same_tokens, (name, report)


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
