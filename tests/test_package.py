"""What `pip install` gives: a wheel in an environment of its own does what the clone does, with no clone in sight."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import ponder_scale
from tests.installing import Environment, build, copy_of_the_clone, files_of_the_clone
from tests.ranks import REPOSITORY

SHIPPED = ("deepspeed_configs", "slurm")
SMALL = ["model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2", "data.seq_len=32"]
SMALL += ["train.steps=2", "train.global_batch=2", "train.micro_batch=2", "optim.warmup_steps=1"]
SMALL += ["train.sanity_step=false", "evaluate.sequences=2"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel of the clone."""
    clone = copy_of_the_clone(tmp_path_factory.mktemp("clone"))
    out = tmp_path_factory.mktemp("dist")
    return build("sdist", clone, out), build("wheel", clone, out)


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """An environment with the wheel, and a folder in which a build of data and a run have been made by it."""
    environment, folder = Environment(tmp_path_factory.mktemp("environment"), built[1]), tmp_path_factory.mktemp("work")
    shutil.copytree(Path(sys.modules["json"].__file__ or "").parent, folder / "corpus")
    tokenizer = ["corpus", "--pattern", "**/*.py", "--vocab-size", 400, "--out", "tokenizer"]
    environment.run("ponder-data", "train-tokenizer", *tokenizer, folder=folder)
    words = ["sources.stdlib.path=corpus", "tokenizer=tokenizer", "out=runs/quickstart/shards", "heldout_fraction=0.2"]
    assert "built runs/quickstart/shards" in environment.run(
        "ponder-data", "build", "python-stdlib", *words, folder=folder
    )
    environment.run("ponder-scale", "train", "quickstart", *SMALL, folder=folder)
    return environment, folder


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as content:
        return {name for name in content.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    expected = set(files_of_the_clone("ponder_scale", "data_pipeline"))
    for folder in SHIPPED:
        expected.remove(f"ponder_scale/_files/{folder}")  # a link in the clone
        expected |= {f"ponder_scale/_files/{name}" for name in files_of_the_clone(folder)}
    assert names_in(built[1]) == expected


def test_the_sdist_builds_the_same_wheel_and_holds_no_tests(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[0]) as content:
        content.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not {"tests", "benchmarks", ".ci"} & {path.name for path in source.iterdir()}
    assert (source / "docs/data.md").is_file() and (source / "CHANGELOG.md").is_file()
    again = build("wheel", source, tmp_path / "dist")
    assert again.name == built[1].name
    with zipfile.ZipFile(again) as ours, zipfile.ZipFile(built[1]) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
        for name in ours.namelist():
            if not name.endswith("/RECORD"):
                assert ours.read(name) == theirs.read(name), name
                # a script that may be run here may be run there
                assert ours.getinfo(name).external_attr == theirs.getinfo(name).external_attr, name


def test_the_commands_of_the_wheel_come_from_it(installed: tuple[Environment, Path]) -> None:
    environment, folder = installed
    call = "import sys, ponder_scale, data_pipeline; print(ponder_scale.__file__, data_pipeline.__file__, *sys.path)"
    ours, data, *path = environment.run("python", "-c", call, folder=folder).split()
    assert Path(ours).is_relative_to(environment.packages) and Path(data).is_relative_to(environment.packages)
    assert not any(Path(each) == REPOSITORY for each in path)
    for command in ("ponder-scale", "ponder-data"):
        shown = environment.run(command, "--version", folder=folder)
        assert shown == f"{command} {ponder_scale.__version__}\n"


def test_the_wheel_plans_trains_and_evaluates(installed: tuple[Environment, Path]) -> None:
    environment, folder = installed
    kept = yaml.safe_load((folder / "runs/quickstart/run/config.yaml").read_text())
    assert kept["train"]["steps"] == 2 and kept["train"]["deepspeed"] == "zero3"
    shown = environment.run("ponder-scale", "plan", "quickstart", *SMALL, "--gpus", 1, folder=folder)
    assert "memory / rank" in shown
    environment.run("ponder-scale", "report", "runs/quickstart/run", folder=folder)
    assert "step 2" in environment.run("ponder-scale", "status", "runs/quickstart/run", folder=folder)


def test_the_wheel_submits_its_templates_and_those_of_a_site(installed: tuple[Environment, Path]) -> None:
    environment, folder = installed
    submit = ["ponder-scale", "submit", "quickstart", *SMALL, "run_dir=runs/handed", "--gpus-per-node", 1]
    assert "sbatch --parsable" in environment.run(*submit, "--dry-run", folder=folder)
    environment.run("ponder-scale", "templates", "slurm", folder=folder)
    for name in files_of_the_clone("slurm"):
        assert (folder / name).read_bytes() == (REPOSITORY / name).read_bytes()
        assert bool((folder / name).stat().st_mode & 0o100) == bool((REPOSITORY / name).stat().st_mode & 0o100), name
    text = (folder / "slurm/train.sbatch").read_text().replace("--signal=B:USR2@300", "--signal=B:USR2@900")
    (folder / "slurm/train.sbatch").write_text(text)
    refused = environment.run(*submit, "--dry-run", "--templates", "slurm", "--time", 10, folder=folder, code=2)
    assert "900 s before" in refused


def test_the_code_that_is_kept_with_a_run_is_a_whole_program(installed: tuple[Environment, Path]) -> None:
    environment, folder = installed
    keep = "from pathlib import Path; from ponder_scale.runs.submit import keep_code; keep_code(Path('kept'))"
    environment.run("python", "-c", keep, folder=folder)
    variables = {"PYTHONPATH": str(folder / "kept" / "code")}  # as slurm/site.sh sets it
    where = "from ponder_scale.files import shipped; print(shipped.SLURM, shipped.DEEPSPEED_CONFIGS)"
    slurm, configs = environment.run("python", "-c", where, folder=folder, **variables).split()
    assert (Path(slurm), Path(configs)) == tuple(folder / "kept" / "code" / name for name in reversed(SHIPPED))
    asked = ["python", "-m", "ponder_scale.cli", "config", "quickstart", "--get", "train.deepspeed"]
    assert environment.run(*asked, folder=folder, **variables) == "zero3\n"
    assert (folder / "kept/code/slurm/rank.sh").stat().st_mode & 0o100


def test_the_page_of_the_python_interface_runs(installed: tuple[Environment, Path]) -> None:
    environment, folder = installed
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/api.md").read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 10
    smaller = ", ".join(repr(word) for word in SMALL if not word.startswith("train.steps"))
    assert '"optim.warmup_steps=2"]' in code
    (folder / "page.py").write_text(code.replace('"optim.warmup_steps=2"]', f'"optim.warmup_steps=2", {smaller}]'))
    shown = environment.run("python", "page.py", folder=folder)
    assert (folder / "runs/api/huggingface/model.safetensors").is_file()
    assert re.search(r"^\d+ tokens\n\d+ parameters\n", shown, flags=re.MULTILINE) and "def read(self" in shown


def test_the_table_of_the_python_interface_names_what_the_front_has() -> None:
    page = (REPOSITORY / "docs/api.md").read_text()
    named = re.findall(r"^\| `(\w+)", page, flags=re.MULTILINE)
    assert {*named, "RunConfig", "ShardSet"} == set(ponder_scale.__all__)
    for name in ponder_scale.__all__:
        assert getattr(ponder_scale, name) is not None and name in dir(ponder_scale)
    with pytest.raises(AttributeError, match="no attribute trian_run"):
        ponder_scale.trian_run  # noqa: B018


def test_the_front_of_the_package_loads_nothing_until_a_name_is_used(installed: tuple[Environment, Path]) -> None:
    environment, folder = installed
    call = (
        "import sys, ponder_scale; before = {name.split('.')[0] for name in sys.modules}; ponder_scale.load_recipe; "
        "print(sorted(before & {'torch', 'numpy', 'transformers', 'yaml'}), 'torch' in sys.modules)"
    )
    assert environment.run("python", "-c", call, folder=folder) == "[] False\n"


def test_a_training_that_fails_is_an_error_of_the_caller_too(tmp_path: Path) -> None:
    config = ponder_scale.load_recipe("quickstart", [f"run_dir={tmp_path}/run", "data.sources.stdlib.path=/nowhere"])
    with pytest.raises(ponder_scale.UserError, match=r"tmp.*/run: training ended with exit code 2"):
        ponder_scale.train_run(config)
