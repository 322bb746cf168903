"""The lab of lab.sh for Python: commands run on its login host, jobs are submitted and waited for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("lab.sh")
NEEDED = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
SYSTEM_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
PATIENCE = 400.0  # seconds, for machines that do other things at the same time


def missing() -> list[str]:
    """The programs that the lab needs and this machine lacks."""
    return [name for name in NEEDED if shutil.which(name, path=SYSTEM_PATH) is None]


class Lab:
    """A running lab; `close` ends it, and so does the end of this process."""

    def __init__(self, folder: Path, *, nodes: int, cpus: int = 128, gpus: int = 8) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-n", str(nodes), "-c", str(cpus), "-g", str(gpus), "-d", str(folder)]
        # it ends when its standard input does: with this process, whatever happens to it
        self._process = subprocess.Popen(
            [str(SCRIPT), *options, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the lab did not start; its logs are in {folder}/log")
        parent = self._process.pid
        self._init = Path(f"/proc/{parent}/task/{parent}/children").read_text().strip()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(
        self, *words: Any, check: bool = True, cwd: Path = REPOSITORY, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login host."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", "--target", self._init, *user, "--mount", "--uts", "--net", "--ipc", "--pid"]
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        variables |= {
            "LAB": str(self.folder),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        variables |= {"PATH": f"{self.folder / 'bin'}{os.pathsep}{SYSTEM_PATH}", "VENV": sys.prefix}
        variables |= {"PONDER_HOME": str(REPOSITORY), "PONDER_SITE": str(Path(__file__).with_name("site.sh"))}
        done = subprocess.run(
            [*enter, f"--wd={cwd}", *map(str, words)],
            capture_output=True,
            text=True,
            env=variables | environment,
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE,
        )
        assert not check or done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done

    def sbatch(self, *words: Any, cwd: Path = REPOSITORY, **environment: str) -> str:
        """Submit and return the job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **environment).stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        line = self.run("scontrol", "show", "job", "--oneliner", job).stdout.splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def state(self, job: str) -> str:
        """Its state."""
        return self.show(job)["JobState"]

    def wait(self, job: str, *states: str) -> str:
        """Wait until a job is in one of the states (default: ended) and return its state."""
        wanted = states or ENDED
        try:
            return self.until(lambda: (state := self.state(job)) in wanted and state, f"job {job} in {wanted}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.seen(job)}") from None

    def seen(self, job: str) -> str:
        """What Slurm knows of a job, and of all that could keep it waiting."""
        words = (("scontrol", "show", "job", job), ("squeue",), ("sinfo", "--list-reasons"))
        said = "".join(self.run(*command, check=False).stdout for command in words)
        log = (self.folder / "log" / "slurmctld.log").read_text().splitlines()
        return said + "\n".join(line for line in log if re.search(rf"JobId={job}\b", line))

    @staticmethod
    def until(condition: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
        """Wait until the condition is true and return its value."""
        deadline = time.monotonic() + patience
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not in {patience:.0f} s: {what}"
            time.sleep(0.5)
        return value
