"""Submit a run to Slurm with a snapshot of its code and configuration, and stop, save or requeue it.

RUN/submissions/0001/
    code/           snapshot of packages and templates, laid out like a clone; the job runs it, now and when requeued
    commit.txt      the commit that the code comes from
    diff.patch      differences between the code and that commit
    config.yaml     the resolved configuration
    deepspeed.json  the sharding file
    command.txt     the call of sbatch
RUN/job             number of the newest job
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import resources as installed
from pathlib import Path

import yaml

from ponder_scale.config import RunConfig
from ponder_scale.errors import UserError
from ponder_scale.figures import seconds_of
from ponder_scale.files.shipped import DEEPSPEED_CONFIGS, LINKS, PACKAGE, SLURM
from ponder_scale.files.write import copy_file
from ponder_scale.runs.requests import SAVE, SAVE_AND_STOP, STOP, request
from ponder_scale.runs.templates import check_templates
from ponder_scale.settings import to_dict
from ponder_scale.version import __version__

TEMPLATE = "train.sbatch"
PYTHON_PACKAGES = ("ponder_scale", "data_pipeline")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED")
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
)
SIGNAL_SECONDS = 60  # Slurm signals this long before the end if --signal gives no time
START_SECONDS = 60  # a start takes at least this long, and Slurm may signal up to a minute early
COMPLETING_SECONDS = 30  # longest wait for a job to leave its nodes, after which it waits again or has ended


class SubmitError(UserError):
    """Slurm is not installed here, or refuses a request."""


@dataclass(frozen=True)
class Resources:
    """The resources that a job asks Slurm for."""

    nodes: int = 1
    gpus_per_node: int = 8
    spares: int = 0  # additional nodes that replace bad ones
    time: str | None = None  # None uses the template's
    options: tuple[str, ...] = ()  # further options of sbatch

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 1), ("spares", 0)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise SubmitError(f"{flag} is {getattr(self, name)}; expected at least {least}")

    @property
    def ranks(self) -> int:
        """The number of ranks: one for each GPU, without those of spare nodes."""
        return self.nodes * self.gpus_per_node


class Submission:
    """A run that you can describe, test and submit."""

    def __init__(self, config: RunConfig, sharding: Path, resources: Resources, templates: Path = SLURM) -> None:
        """Prepare a submission.

        Args:
            sharding: the file that `train.deepspeed` names.
            templates: folder of train.sbatch and site.sh.

        Raises:
            ConfigError: a template is missing.
        """
        self._config, self._sharding, self._resources, self._templates = config, sharding, resources, templates
        check_templates(templates)
        self._run_dir = Path(config.run_dir).absolute()
        number = 1 + max(
            (int(path.name) for path in self._run_dir.glob("submissions/*") if path.name.isdecimal()), default=0
        )
        self.folder = self._run_dir / "submissions" / f"{number:04d}"

    def describe(self) -> str:
        """The snapshot and the call of sbatch that `submit` would make."""
        return f"would keep code and configuration in {self.folder}, and call\n{self._shown(self._command())}"

    def ask(self) -> str:
        """Slurm's estimate of when and where the job could start. Raises SubmitError if it never could."""
        *options, _, configuration = self._command()
        # The copy of the template does not exist yet. Its original will do, because Slurm only reads the head.
        words = [*options, "--test-only", str(self._templates / TEMPLATE), configuration]
        return _slurm(words, self._environment()).stderr.strip()

    def check_free(self) -> None:
        """Raise SubmitError if a job trains this run already."""
        active = state_of(self._run_dir)
        if active is not None and active[1]:
            raise SubmitError(
                f"{self._run_dir} is being trained by job {active[0]} ({active[1]}); "
                f"end it first: ponder-scale stop {shlex.quote(str(self._run_dir))}"
            )

    def check_time(self) -> None:
        """Raise SubmitError if Slurm's signal before the time limit leaves no time for a step."""
        template = (self._templates / TEMPLATE).read_text(encoding="utf-8")
        limit, lead = (self._option(name, template) for name in ("time", "signal"))
        seconds, before = _slurm_seconds(limit), int(lead.partition("@")[2] or SIGNAL_SECONDS)
        if seconds is not None and seconds < before + START_SECONDS:
            raise SubmitError(
                f"--time is {limit}, but Slurm signals its end {before} s before ({lead}), so no step would be done; "
                f"give at least {before + START_SECONDS} s, or a shorter lead with --sbatch=--signal=B:USR2@SECONDS"
            )

    def _option(self, name: str, template: str) -> str:
        """The value that sbatch will use: the last on its command line, else its environment, else the template's."""
        words = [f"--time={self._resources.time}"] if self._resources.time else []
        words += self._resources.options
        given = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
        if name == "time":
            given = given or [word[2:] for word in words if word.startswith("-t")]
        inside = re.findall(rf"^#SBATCH --{name}=(\S+)", template, re.MULTILINE)
        variable = {"time": "SBATCH_TIMELIMIT", "signal": "SBATCH_SIGNAL"}[name]
        return given[-1] if given else os.environ.get(variable) or (inside[-1] if inside else "")

    def submit(self) -> str:
        """Save code and configuration and submit the job. Returns how to watch it. Raises SubmitError."""
        self.check_free()
        command = self._command()
        self._keep(command)
        job = _slurm(command, self._environment()).stdout.strip().split(";")[0]
        (self._run_dir / "job").write_text(job + "\n", encoding="utf-8")
        run = shlex.quote(str(self._run_dir))
        return (
            f"job {job} trains {run}\n"
            f"  ponder-scale status {run}     how it is going\n"
            f"  tail -F {run}/log             what its first rank says\n"
            f"  ponder-scale stop {run}       saves and ends it"
        )

    def _command(self) -> list[str]:
        resources, log = self._resources, str(self._run_dir / "slurm-%j.log")
        prefix = log[: -len("%j.log")].replace("%", "%%")  # a % in the folder's path is no pattern
        command = ["sbatch", "--parsable", f"--job-name=ponder-{_plain(self._run_dir.name)}"]
        command += [f"--output={prefix}%j.log", f"--nodes={resources.nodes + resources.spares}"]
        command += [f"--ntasks-per-node={resources.gpus_per_node}", f"--gpus-per-node={resources.gpus_per_node}"]
        command += ["--no-kill"] if resources.spares else []
        command += [f"--time={resources.time}"] if resources.time else []
        command += [*resources.options, *self._exported()]
        return [*command, str(self.folder / "code" / "slurm" / TEMPLATE), str(self.folder / "config.yaml")]

    def _exported(self) -> list[str]:
        """An option that passes our variables to the job, if the user or the site does not export the environment."""
        given = [option.partition("=")[2] for option in self._resources.options if option.startswith("--export=")]
        names = (given[-1] if given else os.environ.get("SBATCH_EXPORT", "ALL")).split(",")
        if "ALL" in names:
            return []
        return ["--export=" + ",".join([*(name for name in names if name not in ("NONE", "NIL")), *self._ours()])]

    def _ours(self) -> dict[str, str]:
        return {"PONDER_HOME": str(self.folder / "code"), "SPARES": str(self._resources.spares)}

    def _environment(self) -> dict[str, str]:
        # Secrets such as WANDB_API_KEY reach the job through the environment. They are in no file and on no command
        # line, which everybody can read.
        return {**os.environ, **self._ours()}

    def _shown(self, command: list[str]) -> str:
        ours = [f"{key}={shlex.quote(value)}" for key, value in self._ours().items()]
        return " ".join([*ours, shlex.join(command)])

    def _keep(self, command: list[str]) -> None:
        self.folder.mkdir(parents=True)
        keep_code(self.folder, self._templates)
        values = to_dict(self._config)
        shutil.copyfile(self._sharding, self.folder / "deepspeed.json")
        values["train"]["deepspeed"] = str(self.folder / "deepspeed.json")
        (self.folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        (self.folder / "command.txt").write_text(self._shown(command) + "\n", encoding="utf-8")


def keep_code(folder: Path, templates: Path = SLURM) -> None:
    """Copy packages, DeepSpeed files and templates to folder/code. Write the commit, and the differences to it."""
    code = folder / "code"
    parts = {name: Path(str(installed.files(name))) for name in PYTHON_PACKAGES}
    parts |= {"deepspeed_configs": DEEPSPEED_CONFIGS, "slurm": SLURM}
    commit, diff = f"unknown: version {__version__}, not a git checkout\n", ""
    if _git(PACKAGE, "ls-files", "--error-unmatch", "cli.py") is not None:  # not in others' checkout
        commit = _git(PACKAGE, "rev-parse", "HEAD") or "no commit yet\n"
        diff = _git(PACKAGE, "diff", "--binary", "HEAD", "--", *map(str, parts.values())) or ""
    for part, source in {**parts, "slurm": templates}.items():
        for path in _names_in(source):
            (code / part / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source / path, code / part / path)
    links = code / PACKAGE.name / LINKS
    links.mkdir()
    for name in ("deepspeed_configs", "slurm"):
        (links / name).symlink_to(Path("..", "..", name))
    (folder / "commit.txt").write_text(commit, encoding="utf-8")
    (folder / "diff.patch").write_text(diff, encoding="utf-8")


def _names_in(folder: Path) -> list[Path]:
    """The files of a folder, relative to it. In a checkout, files that git ignores are left out."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix != ".pyc"]
    if _git(folder, "ls-files", "-z"):
        listed = _git(folder, "ls-files", "--cached", "--others", "--exclude-standard", "-z") or ""
        names = [Path(name) for name in listed.split("\0") if name]
    return sorted(name for name in names if LINKS not in name.parts and (folder / name).is_file())


def state_of(run_dir: Path) -> tuple[str, str] | None:
    """The newest job of a run and its state in Slurm's queue. None if the run never had a job.

    The state is "" once the job has left the queue. Raises SubmitError if Slurm is not installed here.
    """
    try:
        job = (run_dir / "job").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    words = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
    for _ in range(COMPLETING_SECONDS):
        done = _call(words)
        state = done.stdout.strip() if done.returncode == 0 else ""  # squeue fails for jobs that Slurm has forgotten
        if state != "COMPLETING":
            break
        time.sleep(1)  # once the job has left its nodes, it waits in the queue again or has ended
    return job, "" if state in ENDED else state


def stop(run_dir: Path, *, save: bool) -> str:
    """End a run at its next step, or cancel it at once if it still waits. Returns what was done."""
    job, state = _active(run_dir)
    if state in WAITING:
        _slurm(["scancel", job])
        return f"job {job} was waiting and has been cancelled; what the run has saved is in {run_dir}/checkpoints"
    return _request(run_dir, SAVE_AND_STOP if save else STOP, "saves and ends" if save else "ends without saving")


def save(run_dir: Path) -> str:
    """Ask a run to save at its next step. Returns what was done."""
    job, state = _active(run_dir)
    if state in WAITING:
        raise SubmitError(f"job {job} of {run_dir} waits in the queue, so there is nothing new to save")
    return _request(run_dir, SAVE, "saves and trains on")


def requeue(run_dir: Path) -> str:
    """Ask a run to save, and put its job back into the queue. Returns what was done."""
    job, state = _active(run_dir)
    if not job or state != "RUNNING":
        raise SubmitError(f"{run_dir}: expected a running job of Slurm, found {state or 'none'}")
    _slurm(["scancel", "--batch", "--signal=USR2", job])  # the signal that Slurm itself sends before the time limit
    return f"job {job} saves and goes back to the queue"


def _active(run_dir: Path) -> tuple[str, str]:
    """The job and state of a run that can take requests. Both are "" if Slurm did not start the run."""
    if not (run_dir / "config.yaml").is_file() and not (run_dir / "job").is_file():
        raise SubmitError(f"{run_dir} is not a run folder, because it has no config.yaml")
    found = state_of(run_dir)
    if found is None:
        return "", ""
    if not found[1]:
        raise SubmitError(f"job {found[0]} of {run_dir} is no longer in Slurm's queue, so there is nothing to do")
    return found


def _request(run_dir: Path, name: str, what: str) -> str:
    try:
        path = request(run_dir, name)
    except OSError as error:
        raise SubmitError(f"{run_dir / name} cannot be written: {error.strerror}; ask the owner of the run") from error
    return f"wrote {path}: the run {what} at its next step"


def _slurm_seconds(limit: str) -> float | None:
    """The seconds of a time limit of sbatch, where a plain number means minutes. None for no limit and for nonsense."""
    minutes = limit.isdigit()
    seconds = seconds_of(limit)
    return seconds * 60 if seconds and minutes else seconds or None


def _plain(name: str) -> str:
    """The name with all characters replaced that a tool would have to quote."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _git(folder: Path, *words: str) -> str | None:
    done = _call(["git", "-C", str(folder), *words])
    return done.stdout if done.returncode == 0 else None


def _slurm(words: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = _call(words, environment)
    if done.returncode:
        problem = " ".join((done.stderr or done.stdout).split())
        raise SubmitError(f"{words[0]} refused: {problem}")
    return done


def _call(words: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    except FileNotFoundError:
        if words[0] == "git":
            return subprocess.CompletedProcess(words, 1, "", "")
        raise SubmitError(f"{words[0]} is not installed here; use a login node of the cluster") from None
