"""Exported folders tuned by others: the real TRL and PEFT, and `examples/finetune.py` with them, on the CPU.

Both packages are installed once into a folder of their own, beside those of `test_loading.py`. What they compute is
compared by `in_hands/`, in one process for each version of transformers.
"""

from __future__ import annotations

import functools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ponder_scale.export.card import REFUSED, TESTED, model_card
from ponder_scale.export.folder import write_folder
from ponder_scale.model import compat
from tests.export.versions import CACHE, environment, install, newest
from tests.model.architectures import TINY, make_confident
from tests.ranks import REPOSITORY, run_ranks

EXTRA = {name: TESTED[name] for name in ("trl", "peft")}
BESIDES = {"liger-kernel": "0.8.5", "torchao": "0.18.0", "bitsandbytes": "0.50.2"}
SCRIPT = Path(__file__).with_name("in_hands")
CODE = "".join(path.read_text() for path in sorted(SCRIPT.glob("with_*.py")))
CHECKS = re.findall(r"^def check_(\w+)", CODE, flags=re.MULTILINE)
# of a release of transformers that is new to us
ON_THE_NEWEST = [name for name in CHECKS if name.startswith(("packed", "dpo", "fused"))]
MODULES = dict.fromkeys(CHECKS, "installed") | {f"{name}-on-the-newest": "newest" for name in ON_THE_NEWEST}


@functools.cache
def target() -> Path:
    """The folder with TRL and PEFT; what else they need is in this environment."""
    named = [f"{name}=={number}" for name, number in {**EXTRA, **BESIDES}.items()]
    folder = CACHE / "-".join(["finetune", *EXTRA.values(), *BESIDES.values()])
    install(folder, "--no-deps", *named)
    return folder


def packages(transformers: str) -> dict[str, str]:
    """Variables under which Python finds them, and this version of transformers, but not this project."""
    variables = environment(transformers, ())
    paths = [str(target()), *([variables["PYTHONPATH"]] if "PYTHONPATH" in variables else [])]
    return {**variables, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """An exported folder of each architecture, in one that no import finds this project from."""
    place = tmp_path_factory.mktemp("tuned")
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(place / "tokenizer")
    for name in TINY:
        # untied, since an adapter on a tied head changes the table too when PEFT merges it, in stock models as well
        fields = {"vocab_size": 300, "eos_token_id": 0, "tie_word_embeddings": False}
        fields["n_positions" if name == "gpt2" else "max_position_embeddings"] = 256
        model = make_confident(name, pondering_steps=2, scale_embeds=True, initial_scale=2.0, **fields)
        card = functools.partial(model_card, name, model.config, facts={"commit": "0123"}, licence="apache-2.0")
        weights = model.named_parameters()
        write_folder(place / name, model.config, weights, dtype="float32", card=card, tokenizer=place / "tokenizer")
    return place


@pytest.fixture(scope="module")
def report(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the checks found in a version of transformers: each runs once, all of one version in one process."""

    @functools.cache
    def run(transformers: str) -> dict[str, str]:
        place = tmp_path_factory.mktemp(transformers)
        names = CHECKS if transformers == "installed" else ON_THE_NEWEST
        command = [sys.executable, "-P", str(SCRIPT), str(folders), str(place), *names]
        variables = {**packages(transformers), "HF_HOME": str(place)}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=place)
        print(done.stderr[-5000:])
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODULES)
def test_in_other_hands(name: str, report: Any) -> None:
    found = report(MODULES[name])
    assert found[name.removesuffix("-on-the-newest")] == "right", found[name.removesuffix("-on-the-newest")]


def test_the_card_names_the_versions_that_are_tested(report: Any, folders: Path) -> None:
    found = report("installed")
    assert {name: found[name] for name in EXTRA} == EXTRA
    assert report("newest")["transformers"] == newest()
    for name in ("accelerate", "lm_eval"):
        assert TESTED[name] == version(name), f"set it in ponder_scale/export/card.py: {name} {version(name)}"
    card = (folders / "llama" / "README.md").read_text()
    for name, number in TESTED.items():
        assert f"{name} {number}" in card
    assert f"transformers {compat.OLDEST} to {compat.NEWEST}" in card
    assert all(f"- {way}\n" in card for way in REFUSED) and "override `architectures`" in card
    extra = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["finetune"]
    for requirement, (name, number) in zip(extra, EXTRA.items(), strict=True):
        major, minor = number.split(".")[:2]
        assert requirement == f"{name}>={major}.{minor},<{major}.{int(minor) + 1}"


def sft_on_a_rank(case: dict[str, str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of SFTTrainer's first step under ZeRO-3, one document a rank, and the model's own."""
    os.environ.pop("USE_TORCH", None)
    sys.path[:0] = [case["packages"], str(SCRIPT)]
    sys.argv = ["", case["folders"], case["place"]]
    import hands

    del hands.DOCUMENTS[2]
    own = hands.own_numbers(hands.load())
    zero = {"stage": 3, "reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0}
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {"zero_optimization": zero, **dict.fromkeys(automatic, "auto"), "zero_force_ds_cpu_optimizer": False}
    more = {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "ddp_backend": "gloo"}
    return [hands.first(hands.sft(hands.load(), deepspeed=settings, **more)), own]


def test_on_two_ranks_under_zero_sft_sees_the_models_loss(folders: Path, tmp_path: Path) -> None:
    case = {"packages": str(target()), "folders": str(folders), "place": str(tmp_path)}
    (ranks,) = run_ranks(sft_on_a_rank, [case], timeout=300)
    for rank in ranks:
        assert isinstance(rank, list), rank
        found, expected = rank
        assert found == pytest.approx(expected, rel=2e-4)


ALPACA = [
    {"instruction": "Name the fox.", "input": "", "output": "The quick brown fox"},
    {"instruction": "Square it.", "input": "number", "output": "return number * number"},
    {"prompt": "the dog", "completion": " does not mind"},
]


def finetune(folders: Path, *words: Any, data: list[Any] | str = ALPACA, out: str) -> subprocess.CompletedProcess[str]:
    """Run the example in `folders`; its folder is `out`."""
    text = data if isinstance(data, str) else "\n".join(json.dumps(line) for line in data)
    (folders / f"{out}.jsonl").write_text(text)
    variables = packages("installed")
    variables = {**variables, "PYTHONPATH": f"{REPOSITORY}:{variables['PYTHONPATH']}"}
    command = [sys.executable, str(REPOSITORY / "examples" / "finetune.py"), "llama", f"{out}.jsonl", out]
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, env=variables, cwd=folders, timeout=300
    )


def own_loss(folder: Path, steps: int) -> float:
    """Of the model on the completions of ALPACA, all tokens alike."""
    example = runpy.run_path(str(REPOSITORY / "examples" / "finetune.py"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    lines = [example["_example"](json.dumps(line), "") for line in ALPACA]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, pondering_steps=steps).eval()
    total, count = 0.0, 0
    for record in example["encode"](lines, tokenizer, 256):
        tokens, labels = torch.tensor([record["input_ids"]]), torch.tensor([record["labels"]])
        of_one = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(tokens, labels=labels).loss.item() * of_one
        count += of_one
    return total / count


def loads_alone(folder: Path, steps: int, place: Path) -> None:
    """Raise unless a process that sees neither this project nor PEFT loads a folder, and generates."""
    code = "import json, sys, torch; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
    code += "model = A.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
    code += "tokens = T.from_pretrained(sys.argv[1], trust_remote_code=True)('the dog', return_tensors='pt')\n"
    code += "print(json.dumps([model.config.pondering_steps, type(model).__name__,"
    code += " tokens.input_ids.tolist(), model.generate(**tokens, max_new_tokens=3).shape[1]]))"
    command = [sys.executable, "-I", "-c", code, str(folder)]
    loaded = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    found, name, tokens, length = json.loads(loaded.stdout.splitlines()[-1])
    assert (found, name) == (steps, "PonderLlamaForCausalLM") and length > len(tokens[0])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("out", "words", "steps"),
    [
        ("full", ["--gradient-checkpointing"], 2),
        ("adapted", ["--lora", 4, "--pondering-steps", 1, "--packing"], 1),
    ],
)
def test_the_example_tunes_a_folder_into_one_that_loads_alone(
    out: str, words: list[Any], steps: int, folders: Path, tmp_path: Path
) -> None:
    before = (folders / "llama" / "README.md").read_text()
    common = ["--epochs", 6, "--learning-rate", 0.02, "--log-every", 1]
    done = finetune(folders, *common, *words, out=out)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    losses = re.search(rf"{out}: tuned on 3 examples, loss (\S+) to (\S+)\n", done.stdout)
    assert losses is not None
    assert abs(float(losses[1]) - own_loss(folders / "llama", steps)) < 2e-3
    if out == "adapted":
        loads_alone(folders / out, steps, tmp_path)
    tuned = own_loss(folders / out, steps)
    assert tuned < float(losses[2]) < float(losses[1])
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folders / out, capture_output=True, text=True)
    assert sums.returncode == 0, sums.stdout
    names = {path.name for path in (folders / "llama").iterdir()}
    assert {path.name for path in (folders / out).iterdir()} == names
    configurations = [json.loads((folders / name / "config.json").read_text()) for name in ("llama", out)]
    assert configurations[1] == {**configurations[0], "pondering_steps": steps}
    for path in (folders / "llama").glob("*token*"):
        assert (folders / out / path.name).read_text() == path.read_text()
    card = (folders / out / "README.md").read_text()
    assert card.startswith(before.replace("# llama\n", f"# {out}\n").replace('"llama"', f'"{out}"').rstrip())
    assert "## Tuned from llama" in card and f"| pondering steps S | {steps} |" in card


GOOD = json.dumps(ALPACA[0])
BAD_DATA = {
    "": "bad.jsonl: holds no example",
    "\n \n": "bad.jsonl: holds no example",
    f"{GOOD}\n\n{{": "bad.jsonl, line 3: is not JSON",
    "[1]": "bad.jsonl, line 1: is a list; expected an object",
    "[": r"line 1: is not JSON .*; a file that is one array becomes lines by jq -c '\.\[\]'",
    f'{GOOD}\n{{"instruction": "a"}}': "bad.jsonl, line 2: has no output; expected instruction, output and perhaps",
    '{"output": "a"}': "line 1: has no instruction",
    '{"prompt": "a"}': "line 1: has no completion",
    '{"completion": "a", "prompt": null}': "line 1: has no prompt",
    '{"text": "a"}': "line 1: has no prompt; expected instruction, output and perhaps input, or prompt and completion",
    '{"prompt": [{"role": "user"}], "completion": "a"}': "line 1: prompt is a list; expected a text",
    '{"instruction": "a", "output": "b", "input": 3}': "line 1: input is a int; expected a text",
    '{"prompt": "a", "completion": " "}': "line 1: completion is empty, so there is nothing to learn",
    '{"prompt": "", "completion": "a"}': "line 1: prompt is empty",
}


@pytest.fixture
def refuse(folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the example in this process, where it has to end with 2 and one line before it trains."""

    def run(*words: Any) -> str:
        monkeypatch.chdir(folders)
        monkeypatch.syspath_prepend(target())  # found there, and not imported before all is checked
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "examples" / "finetune.py"), run_name="__main__")
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        return said

    return run


@pytest.mark.parametrize("content", BAD_DATA)
def test_data_that_is_no_example_is_named_with_its_line(content: str, refuse: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    assert re.search(BAD_DATA[content], refuse("llama", tmp_path / "bad.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_tuned_is_refused_before_it_is_trained(refuse: Any, folders: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(GOOD)
    (tmp_path / "file").write_text("")
    for words, sentence in (
        (("llama", data, folders / "llama"), "llama: exists already; remove it or give another folder"),
        (("llama", data, tmp_path / "file" / "out"), "file/out: cannot be made"),
        (("llama", tmp_path / "missing.jsonl", out), "missing.jsonl: cannot be read"),
        (("llama", tmp_path, out), "cannot be read"),
        (("llama", data, out, "--lora", 0), "argument --lora: '0'; expected an integer of at least 1"),
        (("llama", data, out, "--pondering-steps", -1), "expected an integer of at least 0"),
        (("llama", data, out, "--pondering-steps", 1.5), "'1.5'; expected an integer of at least 0"),
        (("llama", data, out, "--epochs", "nan"), "argument --epochs: 'nan'; expected a number of more than 0"),
        (("llama", data, out, "--learning-rate", 0), "expected a number of more than 0"),
        (("llama", data, out, "--ponder", 3), "unrecognized arguments: --ponder 3"),
        (("llama", data), "the following arguments are required: out"),
    ):
        assert sentence in refuse(*words), words


def test_a_folder_that_cannot_be_tuned_is_refused(refuse: Any, folders: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(GOOD)
    for name in ("endless", "wordless", "weightless", "strange"):
        shutil.copytree(folders / "llama", tmp_path / name)
    (tmp_path / "endless" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "wordless" / "tokenizer.json").unlink()
    (tmp_path / "weightless" / "model.safetensors").unlink()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "bert"}')
    for words, sentence in (
        ((tmp_path / "nowhere",), "nowhere/config.json: cannot be read"),
        ((tmp_path / "strange",), "model_type is 'bert'; expected one of llama"),
        ((tmp_path / "endless",), "names no eos_token, so a tuned model would never stop"),
        ((tmp_path / "wordless",), "wordless: its tokenizer cannot be loaded"),
        ((tmp_path / "weightless",), "weightless: no weights in it"),
        (("llama", "--max-length", 257), "--max-length is 257, the model has 256 positions; lower it"),
        (("llama", "--max-length", 10), "--max-length is 10: every prompt is at least as long; raise it"),
    ):
        folder, *more = words
        assert sentence in refuse(folder, data, out, *more), words
        assert not out.exists()


def test_missing_packages_are_named(refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.jsonl").write_text(GOOD)
    monkeypatch.setitem(sys.modules, "peft", None)
    said = refuse("llama", tmp_path / "data.jsonl", tmp_path / "out")
    assert "the package peft is not installed; pip install 'ponder-scale[finetune]'" in said


def test_the_page_names_the_flags_that_there_are(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "finetuning.md").read_text()
    example = runpy.run_path(str(REPOSITORY / "examples" / "finetune.py"))
    commands = re.findall(r"^python examples/finetune.py (.*)$", page, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["", *shlex.split(command)])
        options = vars(example["parse"]())
    named = set(re.findall(r"`--([a-z-]+)", page))
    assert named - {"help"} <= {name.replace("_", "-") for name in options}
    form = re.search(r"```json\n(.*?)```", page, flags=re.DOTALL)
    assert form is not None
    (folders / "page.jsonl").write_text(form[1])
    with_template, plain = example["read_examples"](folders / "page.jsonl")
    assert with_template.prompt.startswith("Below is an instruction that describes a task. Write")
    assert "### Instruction:\nName a fox.\n\n### Response:\n" in with_template.prompt
    assert plain == ("Q: Name a fox.\nA:", " The quick brown fox.")
