"""The project as it is installed from a wheel: a copy of the clone, and an environment of its own for what is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from tests.ranks import REPOSITORY


def files_of_the_clone(*folders: str) -> list[str]:
    """What git knows or would, from the clone: links are links."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *folders]
    names = subprocess.check_output(listed, cwd=REPOSITORY, text=True).split("\0")
    return sorted(name for name in names if name and os.path.lexists(REPOSITORY / name))


def copy_of_the_clone(target: Path, *folders: str) -> Path:
    """Copies these files, all by default, so that nothing is built in the clone."""
    for name in files_of_the_clone(*folders):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, target / name, follow_symlinks=False)
    return target


def build(kind: str, source: Path, out: Path) -> Path:
    """The "sdist" or "wheel" that the build backend makes of a folder, without a network."""
    call = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-c", call, out], cwd=source, capture_output=True, text=True, env=_plain())
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


class Environment:
    """A fresh virtual environment with one wheel in it; other packages are those of the environment of the tests."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", folder])
        self.bin = folder / "bin"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        # .pth files are not read in a folder that is named by one, so that an editable install stays outside
        (self.packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [sys.executable, "-m", "pip", "--python", self.bin / "python", "--disable-pip-version-check"]
        subprocess.check_call([*install, "install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel])

    def run(self, *words: Any, folder: Path, code: int = 0, **variables: str) -> str:
        """What a command of the environment prints, outside of the clone."""
        others = Path(sys.executable).parent  # ninja, of DeepSpeed's build
        environment = {**_plain(), "PATH": f"{self.bin}:{others}:{os.environ['PATH']}", **variables}
        done = subprocess.run(
            [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, (words, done.returncode, done.stdout[-1000:] + done.stderr[-3000:])
        return done.stdout + done.stderr


def _plain() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
