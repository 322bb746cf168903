"""What the project says of itself in several files is the same in all: versions, bounds, locks, workflows, paper."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import ponder_scale
from tests.installing import files_of_the_clone
from tests.ranks import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
PAPER = "PonderLM: Pretraining Language Models to Ponder in Continuous Space"
UNTESTED = ("liger-kernel",)  # needs a GPU, and is in no lock
# whose next number is a new series, though it is not the first
BY_SECOND_NUMBER = ("torch", "transformers", "trl")


def locked(name: str) -> dict[str, Version]:
    """The versions of a lock, by the names of packages as pip compares them."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (REPOSITORY / name).read_text(), flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): Version(version) for package, version in found}


DEV = {**locked("requirements-dev.lock"), **locked("requirements-torch.txt"), **locked("requirements-triton.lock")}
BOUNDED = [Requirement(each) for each in PROJECT["dependencies"]]
BOUNDED += [
    Requirement(each) for extra, needed in PROJECT["optional-dependencies"].items() if extra != "dev" for each in needed
]


@pytest.mark.parametrize("requirement", BOUNDED, ids=lambda requirement: requirement.name)
def test_a_dependency_ends_before_the_first_series_that_no_test_has_seen(requirement: Requirement) -> None:
    (most,) = [Version(each.version) for each in requirement.specifier if each.operator == "<"]
    if requirement.name in UNTESTED or requirement.name not in DEV:
        return
    tested = DEV[requirement.name]
    assert tested in requirement.specifier
    by_second = tested.major == 0 or requirement.name in BY_SECOND_NUMBER
    following = Version(f"{tested.major}.{tested.minor + 1}") if by_second else Version(f"{tested.major + 1}")
    # the folders are loaded by one series of transformers above the locked one
    assert most == following or (requirement.name == "transformers" and most == Version("5.25")), most


def test_every_package_of_a_lock_is_pinned_with_hashes() -> None:
    locks = sorted(path.name for path in REPOSITORY.glob("requirements*.lock"))
    assert locks == [f"requirements{name}.lock" for name in ("-dev", "-docs", "-triton", "-vllm", "")]
    for name in locks:
        entries = [line for line in re.split(r"(?<!\\)\n", (REPOSITORY / name).read_text()) if line and line[0] != "#"]
        assert entries
        for entry in entries:
            assert re.match(r"[\w.-]+==\S+.*--hash=sha256:[0-9a-f]{64}", entry.replace("\\\n", " ")), entry[:80]


def test_what_is_for_development_is_apart_and_the_rest_is_the_same() -> None:
    run, dev = locked("requirements.lock"), locked("requirements-dev.lock")
    assert run.items() < dev.items()
    tools = {Requirement(each).name.lower() for each in PROJECT["optional-dependencies"]["dev"]}
    assert tools - {"triton"} <= dev.keys() and not tools & run.keys() - {"accelerate"}
    needed = {re.sub(r"[-_.]+", "-", Requirement(each).name).lower() for each in PROJECT["dependencies"]}
    assert needed - run.keys() == {"torch"}
    # whose builds differ by index: see CONTRIBUTING
    assert not {"torch", "triton"} & dev.keys() and not [name for name in dev if name.startswith(("nvidia", "cuda"))]


def test_each_python_that_is_offered_is_tested_and_no_other_is_offered() -> None:
    offered = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if offered.contains(f"3.{minor}")] == list(PYTHONS)
    classifiers = [each.split(" :: ")[-1] for each in PROJECT["classifiers"] if " :: Python :: 3." in each]
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    assert tuple(classifiers) == tuple(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == PYTHONS


def test_the_workflows_call_targets_that_the_makefile_has() -> None:
    targets: list[str] = []
    for path in sorted((REPOSITORY / ".github/workflows").glob("*.yml")):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            assert job["timeout-minutes"] <= 60
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
                words = re.findall(r"\bmake ((?:[\w-]+ ?)+)", step.get("run", ""))
                targets += [word for each in words for word in each.split() if word != "WORKERS"]
    assert {"lint", "test", "wheel", "docs", "test-slurm", "test-vllm"} <= set(targets)
    done = subprocess.run(["make", "-n", *targets], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_and_date_are_the_same_wherever_they_stand() -> None:
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    headings = re.findall(r"^## (\S+), (.*)$", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    version, date = headings[0]
    assert version == str(cited["version"]) == ponder_scale.__version__
    assert date == str(cited.get("date-released", "unreleased"))


def test_the_paper_is_cited_by_its_present_title() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert cited["references"][0]["title"] == PAPER
    for name in files_of_the_clone():
        path = REPOSITORY / name
        if path.suffix in (".py", ".md", ".cff", ".toml", ".yaml", ".yml") and path.is_file():
            words = " ".join(path.read_text(encoding="utf-8").split())
            for found in re.finditer("pretraining language models to ponder", words, flags=re.IGNORECASE):
                if name != "tests/test_project.py":
                    assert words[found.start() - len("PonderLM: ") :].startswith(PAPER), name


def test_what_is_built_into_an_image_is_what_is_locked() -> None:
    image = (REPOSITORY / "Dockerfile").read_text()
    for name in re.findall(r"requirements[\w.-]*\.(?:lock|txt)", image):
        assert (REPOSITORY / name).is_file()
    assert "--require-hashes -r requirements.lock" in image and "-r requirements-torch.txt" in image
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def test_what_looks_at_a_commit_is_what_make_installs() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split()[0] for each in hooks for hook in each["hooks"]]
    assert [each["repo"] for each in hooks] == ["local"]
    lint = subprocess.check_output(["make", "-n", "lint"], cwd=REPOSITORY, text=True)
    assert entries and all(entry in lint for entry in entries)
