"""From a corpus to generated text through the real commands, and what they answer to bad input."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_command

TRAIN = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.pondering_steps=2",
    "data.seq_len=32",
    "train.steps=4",
    "train.global_batch=4",
    "train.precision=fp32",
    "optim.lr=3e-3",
    "evaluate.sequences=4",
    "log.every_steps=2",
]


def run(*command: Any, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours and check its exit code."""
    done = run_command(*command, **environment)
    assert done.returncode == code, (done.args, done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done


def error_of(*command: Any) -> str:
    """The one line that a command answers to bad input; no traceback, exit code 2."""
    done = run(*command, code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"def function_{i}(x):\n    return x + {i} * {i % 7}\n" * (1 + i % 5) for i in range(300)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def shards(corpus: Path) -> Path:
    run("ponder-data", "train-tokenizer", corpus / "texts.jsonl", "--vocab-size", 300, "--out", corpus / "tokenizer")
    settings = ["sources.texts.kind=jsonl", f"sources.texts.path={corpus / 'texts.jsonl'}", "heldout_fraction=0.1"]
    run("ponder-data", "build", *settings, f"tokenizer={corpus / 'tokenizer'}", f"out={corpus / 'shards'}")
    return corpus / "shards"


@pytest.fixture(scope="module")
def recipe(shards: Path) -> Path:
    path = shards.parent / "recipe.yaml"
    path.write_text(f"run_dir: {shards.parent / 'run'}\ndata: {{sources: {{texts: {{path: {shards}}}}}}}\n")
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path) -> tuple[Path, str]:
    # an override before and one after the flag
    done = run("ponder-scale", "train", recipe, TRAIN[0], "--nproc", 2, *TRAIN[1:])
    return recipe.parent / "run", done.stdout


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, str]) -> tuple[Path, str]:
    folder = trained[0].with_name("huggingface")
    done = run("ponder-scale", "export", trained[0], folder, "--verify")
    return folder, done.stdout


def test_training_says_what_it_does(trained: tuple[Path, str]) -> None:
    _, printed = trained
    assert "S = 2, ZeRO-3 on 2 ranks (cpu), recompute pass, steps 1 to 4" in printed
    assert re.search(r"step 4/4  loss \d\.\d{4}  passes (\d\.\d{3} ?){3} .*tok/s .*left 0s", printed)
    assert re.search(
        r"held-out perplexity of \w+ over \d+ tokens:\s+[\d:]+\s+pass 0 [\d.]+  pass 1 [\d.]+  pass 2 [\d.]+  bits per",
        printed,
    )
    assert "warning" not in printed.lower()
    date, *lines = printed.splitlines()
    assert re.fullmatch(r"== \d{4}-\d\d-\d\d", date)
    for line in lines:
        assert re.match(r"\d\d:\d\d:\d\d .*\S$", line) and (len(line) <= 120 or " /" in line), line


def test_the_export_is_complete_and_verified(exported: tuple[Path, str]) -> None:
    folder, printed = exported
    assert "in a fresh process: logits within 0.0e+00, cached decoding equals uncached" in printed
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert {"modeling.py", "configuration.py", "ponder.py", "pondering_embedding.py", "cache.py"} <= names
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling.PonderLlamaForCausalLM"
    assert (config["model_type"], config["pondering_steps"]) == ("ponder_llama", 2)


def test_an_export_in_bf16_is_verified_too(trained: tuple[Path, str], tmp_path: Path) -> None:
    done = run("ponder-scale", "export", trained[0], tmp_path / "bf16", "--dtype", "bfloat16", "--verify")
    assert "verified" in done.stdout


def test_the_exported_model_evaluates_like_the_trained_one(exported: tuple[Path, str], shards: Path) -> None:
    run_dir = shards.parent / "run"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = next(line for line in lines if line["event"] == "evaluation")
    done = run("ponder-scale", "evaluate", "ppl", exported[0], "--data", shards, "--sequences", 4)
    losses = [float(loss) for loss in re.findall(r"pass \d: loss ([\d.]+)", done.stdout)]
    assert losses == pytest.approx(expected["losses"], abs=1e-4)


def test_the_exported_model_generates(exported: tuple[Path, str]) -> None:
    for more in ([], ["--pondering-steps", 0], ["--temperature", 0.8], ["--compile"]):
        done = run("ponder-scale", "generate", exported[0], "--prompt", "def f", "--max-new-tokens", 5, *more)
        assert done.stdout.startswith("def f")
        assert re.search(r"\d tokens in [\d.]+ s, [\d.]+ tokens/s", done.stdout)


def closure(*names: str) -> set[str]:
    """Distributions that `names` need, by their own metadata."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        requirements = [Requirement(text) for text in needs]
        waiting += [need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_the_exported_folder_needs_only_torch_and_transformers(exported: tuple[Path, str], tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for name in closure("torch", "transformers"):
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files or () if Path(file).parts[0] != ".."}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    script = f"""
import sys
sys.path.insert(0, {str(site)!r})
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(exported[0])!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({str(exported[0])!r}, trust_remote_code=True)
print(tokenizer.decode(model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=5)[0]))
for name in ("ponder_scale", "deepspeed", "data_pipeline"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(name + " is there")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-S", "-E", "-s", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("def f")


def test_a_wrong_key_type_or_bound_is_answered_with_the_key(recipe: Path) -> None:
    train = ("ponder-scale", "train", recipe, *TRAIN)
    assert "unknown key train.stepz; did you mean train.steps?" in error_of(*train, "train.stepz=3")
    assert "train.steps is '*.py'; expected a whole number" in error_of(*train, "train.steps=*.py")
    assert "model.pondering_steps is -1; expected at least 0" in error_of(*train, "model.pondering_steps=-1")
    assert "optim.lr is 0.0; expected more than 0" in error_of(*train, "optim.lr=0", "optim.min_lr=0")
    policies = "train.recompute is 'all'; expected one of none, selective, layer, pass, pass+layer, auto"
    assert policies in error_of(*train, "train.recompute=all")
    assert "expected key=value" in error_of(*train, "train.steps=1", "faster")


def test_data_that_does_not_fit_is_answered_with_the_file(recipe: Path, shards: Path, tmp_path: Path) -> None:
    train = ("ponder-scale", "train", recipe, *TRAIN, f"run_dir={tmp_path / 'run'}")
    assert "manifest.json" in error_of(*train, f"data.sources.texts.path={tmp_path}")
    assert "model.vocab_size is 100; source texts" in error_of(*train, "model.vocab_size=100")
    assert "multiple of train.micro_batch x ranks (3 x 1 = 3)" in error_of(*train, "train.micro_batch=3")
    assert "lower data.seq_len" in error_of(*train, "data.seq_len=10000000")
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(shards), str(broken)], check=True)
    data = next(broken.glob("train-*.bin"))
    with data.open("rb+") as stream:
        stream.truncate(data.stat().st_size - 100)
    assert data.name in error_of(*train, f"data.sources.texts.path={broken}")
    data.unlink()
    assert f"{data.name}: missing" in error_of(*train, f"data.sources.texts.path={broken}")
    assert not (tmp_path / "run").exists()


def test_export_evaluate_and_generate_refuse_what_they_cannot_use(
    exported: tuple[Path, str], corpus: Path, tmp_path: Path
) -> None:
    run_dir = exported[0].with_name("run")
    assert "exists already" in error_of("ponder-scale", "export", run_dir, exported[0])
    assert "expected a run folder" in error_of("ponder-scale", "export", corpus, tmp_path / "out")
    assert "no config.json in it" in error_of("ponder-scale", "generate", corpus, "--prompt", "x")
    assert "expected at least 1" in error_of(
        "ponder-scale", "generate", exported[0], "--prompt", "x", "--max-new-tokens", 0
    )
    assert "give one of the three" in error_of(
        "ponder-scale", "generate", exported[0], "--prompt", "x", "--compile", "--exit-kl", 0.1
    )
    run("ponder-data", "train-tokenizer", corpus / "texts.jsonl", "--vocab-size", 290, "--out", tmp_path / "other")
    settings = ["sources.texts.kind=jsonl", f"sources.texts.path={corpus / 'texts.jsonl'}", "heldout_fraction=0.5"]
    run("ponder-data", "build", *settings, f"tokenizer={tmp_path / 'other'}", f"out={tmp_path / 'shards'}")
    message = error_of("ponder-scale", "evaluate", "ppl", exported[0], "--data", tmp_path / "shards")
    assert "evaluate on shards that were made with the model's own tokenizer" in message
    assert not (tmp_path / "out").exists()


def test_a_failed_rank_ends_the_others_with_its_exit_code(recipe: Path, tmp_path: Path) -> None:
    settings = [*TRAIN, f"run_dir={tmp_path / 'run'}", "train.global_batch=3", "--nproc", 2]
    assert "train.global_batch is 3" in error_of("ponder-scale", "train", recipe, *settings)


def test_a_sentencepiece_model_is_exported_so_that_transformers_agrees(corpus: Path, tmp_path: Path) -> None:
    options = ["--vocab-size", 300, "--kind", "sentencepiece", "--out", tmp_path / "tokenizer"]
    run("ponder-data", "train-tokenizer", corpus / "texts.jsonl", *options)
    settings = ["sources.texts.kind=jsonl", f"sources.texts.path={corpus / 'texts.jsonl'}", "heldout_fraction=0.1"]
    run("ponder-data", "build", *settings, f"tokenizer={tmp_path / 'tokenizer'}", f"out={tmp_path / 'shards'}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run_dir: {tmp_path / 'run'}\ndata: {{sources: {{texts: {{path: {tmp_path / 'shards'}}}}}}}\n")
    run("ponder-scale", "train", recipe, *TRAIN, "train.steps=1")
    run("ponder-scale", "export", tmp_path / "run", tmp_path / "huggingface", "--verify")
    done = run("ponder-scale", "generate", tmp_path / "huggingface", "--prompt", "def f", "--max-new-tokens", 3)
    assert done.stdout.startswith("def f")
    run("ponder-scale", "evaluate", "ppl", tmp_path / "huggingface", "--data", tmp_path / "shards", "--sequences", 2)
