"""What slurm/site.sh makes of the shell and the environment it finds; on a cluster: tests/slurm."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ponder_scale.files.shipped import SLURM

HOME = shlex.quote(str(SLURM.parent))


def sourced(
    folder: Path, then: str = "true", before: str = "true", **variables: str
) -> subprocess.CompletedProcess[str]:
    """A template with the arguments RECIPE and key=value in a folder: it sources the file, and does something."""
    script = f"home={HOME}\n{before}\nsource $home/slurm/site.sh || exit 2\nset -uo pipefail\n{then}"
    words = ["bash", "-c", script, "template", "RECIPE", "key=value"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "SLURM_SUBMIT_DIR": str(folder), **variables}
    return subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)


def make_environment(folder: Path, activate: str | None) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    if activate is not None:
        (folder / "bin" / "activate").write_text(activate)
    return folder


def test_an_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    for wrong in ("/nowhere", str(tmp_path), str(tmp_path / "with space")):
        done = sourced(tmp_path, VENV=wrong)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: VENV is {wrong}: no bin/python in it; expected a venv or conda environment that every node sees\n"
        )
    assert sourced(tmp_path).returncode == 0  # none is given and none is there: modules, or a container


def test_a_venv_is_activated_given_or_found(tmp_path: Path) -> None:
    for folder, variables in (
        (tmp_path / "my env", {"VENV": str(tmp_path / "my env")}),
        (tmp_path / ".venv", {}),
    ):
        make_environment(folder, "activated=$BASH_SOURCE\n")
        assert sourced(tmp_path, "echo $activated", **variables).stdout == f"{folder}/bin/activate\n"


def test_a_conda_environment_stands_in_for_a_venv(tmp_path: Path) -> None:
    """Its own activate would take RECIPE for the name of an environment."""
    folder = make_environment(tmp_path / "conda env", 'echo "no environment $1" >&2; return 1\n')
    (folder / "conda-meta").mkdir()
    hooks = folder / "etc" / "conda" / "activate.d"
    hooks.mkdir(parents=True)
    (hooks / "cuda.sh").write_text("export CUDA_HOME=of-conda\n")
    done = sourced(tmp_path, "command -v python; echo $CONDA_PREFIX $CUDA_HOME", VENV=str(folder))
    assert (done.stdout, done.stderr) == (f"{folder}/bin/python\n{folder} of-conda\n", "")
    beside = make_environment(tmp_path / ".venv", "export PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH\n")
    conda = {"CONDA_PREFIX": str(folder), "PATH": f"{folder}/bin:/usr/bin:/bin"}  # active where the job was submitted
    assert sourced(tmp_path, "command -v python", **conda).stdout == f"{beside}/bin/python\n"


@pytest.mark.parametrize("version", ["3.2.57(1)-release", "4.2.46(2)-release", "4.3.48(1)-release", ""])
def test_a_shell_that_is_too_old_is_named(version: str, tmp_path: Path) -> None:
    done = sourced(tmp_path, before=f"BASH_VERSION='{version}'")
    assert done.returncode == 2 and "expected bash 4.4 or newer; name one in the first line" in done.stderr
    assert f"the shell is {'bash ' + version if version else 'no bash'}," in done.stderr


@pytest.mark.parametrize("version", ["4.4.20(1)-release", "5.2.15(1)-release", "10.1.0(1)-release"])
def test_newer_shells_are_taken(version: str, tmp_path: Path) -> None:
    assert sourced(tmp_path, before=f"BASH_VERSION='{version}'").returncode == 0


def test_tasks_get_what_is_set_up_here_whatever_the_job_was_given(tmp_path: Path) -> None:
    assert sourced(tmp_path, "env | grep ^SLURM_EXPORT_ENV", SLURM_EXPORT_ENV="NONE").stdout == "SLURM_EXPORT_ENV=ALL\n"
