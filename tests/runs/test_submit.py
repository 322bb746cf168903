"""What `ponder-scale submit` and its kin say without a cluster; with one, see tests/slurm."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.files.shipped import DEEPSPEED_CONFIGS, SLURM
from ponder_scale.runs.submit import Resources, Submission, SubmitError, keep_code
from ponder_scale.settings import load
from ponder_scale.version import __version__
from tests.commands import REPOSITORY, run_command
from tests.installing import copy_of_the_clone
from tests.tiny import TinyShards

ODD = "run 1; $(touch pwned) 'q' \"100%j\" &"


def answer(*arguments: object, code: int = 0) -> str:
    """What the command prints, on a machine without Slurm and git."""
    done = run_command("ponder-scale", *arguments, PATH="/nowhere")
    assert done.returncode == code, done
    return done.stdout + done.stderr


def test_the_command_is_safe_for_any_folder(tmp_path: Path) -> None:
    overrides = ["data.sources.x.path=x", "train.steps=1", "train.global_batch=2"]
    folder = tmp_path / ODD
    config = load(RunConfig, None, [f"run_dir={folder}", *overrides])
    assert config.run_dir == str(folder)
    submission = Submission(config, DEEPSPEED_CONFIGS / "zero3.json", Resources(2, 4, 1, "1:00:00", ("--qos=a b",)))
    words = shlex.split(submission.describe().split("call\n")[1])
    home = folder / "submissions" / "0001"
    assert words[:2] == [f"PONDER_HOME={home / 'code'}", "SPARES=1"]
    assert words[2:4] == ["sbatch", "--parsable"]
    assert f"--output={str(folder).replace('%', '%%')}/slurm-%j.log" in words  # % begins a pattern of sbatch
    assert {"--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4", "--no-kill", "--time=1:00:00", "--qos=a b"} < set(
        words
    )
    assert words[-2:] == [str(home / "code" / "slurm" / "train.sbatch"), str(home / "config.yaml")]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "site", "exported"),
    [
        ((), None, None),
        (("--export=ALL,A=b",), None, None),
        (("--export=NONE",), None, "--export=PONDER_HOME,SPARES"),
        (("--export=ALL", "--export=A=b,C"), None, "--export=A=b,C,PONDER_HOME,SPARES"),
        ((), "NONE", "--export=PONDER_HOME,SPARES"),
        (("--export=ALL",), "NONE", None),
    ],
)
def test_a_job_that_takes_no_environment_along_has_its_code_all_the_same(
    options: tuple[str, ...], site: str | None, exported: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SBATCH_EXPORT", raising=False)
    if site:
        monkeypatch.setenv("SBATCH_EXPORT", site)
    settings = [f"run_dir={tmp_path}/run", "data.sources.x.path=x", "train.steps=1", "train.global_batch=2"]
    submission = Submission(load(RunConfig, None, settings), Path("zero3.json"), Resources(options=options))
    words = shlex.split(submission.describe().split("call\n")[1])
    given = [word for word in words if word.startswith("--export=")]  # sbatch takes the last
    assert given == [*options, *([exported] if exported else [])]


def test_a_time_limit_below_the_lead_of_its_signal_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_TIMELIMIT", "SBATCH_SIGNAL"):
        monkeypatch.delenv(name, raising=False)
    needed = [f"run_dir={tmp_path}", "data.sources.x.path=x", "train.steps=1", "train.global_batch=2"]
    config = load(RunConfig, None, needed)

    def check(time: str | None = None, *options: str) -> None:
        Submission(config, DEEPSPEED_CONFIGS / "zero3.json", Resources(1, 1, 0, time, options)).check_time()

    for fine in (None, "6", "360", "6:00", "1-00", "UNLIMITED", "INFINITE", "nonsense"):  # sbatch judges the last
        check(fine)
    check("00:02:00", "--signal=B:USR2@50")
    check("5", "--time=1:00:00")
    for short in ("2", "00:05:00", "5:59"):
        with pytest.raises(SubmitError, match=rf"--time is {short}, .*300 s before \(B:USR2@300\).* at least 360 s"):
            check(short)
    for options in (("--time=3",), ("-t3",), ("--signal=B:USR2@86400",)):
        with pytest.raises(SubmitError):
            check(None, *options)
    monkeypatch.setenv("SBATCH_TIMELIMIT", "3")
    with pytest.raises(SubmitError, match="--time is 3"):
        check()
    monkeypatch.setenv("SBATCH_SIGNAL", "USR2")  # a minute before
    check()


def test_the_kept_code_is_what_a_job_needs(tmp_path: Path) -> None:
    keep_code(tmp_path)
    names = ("ponder_scale/cli.py", "data_pipeline/cli.py", "deepspeed_configs/zero3.json", "slurm/site.sh")
    for name in (*names, "ponder_scale/_files/slurm/train.sbatch", "ponder_scale/_files/deepspeed_configs/zero1.json"):
        assert (tmp_path / "code" / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert (tmp_path / "code" / "slurm" / "rank.sh").stat().st_mode & 0o100
    assert (tmp_path / "commit.txt").read_text().strip() and (tmp_path / "diff.patch").is_file()
    assert not list((tmp_path / "code").rglob("*.pyc"))


def test_what_is_wrong_or_would_be_done_is_said_before_anything_is_written(
    tiny_shards: TinyShards,
    tmp_path: Path,
) -> None:
    data = f"data.sources.x.path={tiny_shards().folder}"
    sizes = ["model.hidden_size=16", "model.num_attention_heads=2", "model.num_hidden_layers=2", "train.steps=2"]
    submit = ["submit", "quickstart", "data.sources={}", data, f"run_dir={tmp_path / 'run'}", *sizes]
    submit += ["train.global_batch=8", "train.micro_batch=4", "--gpus-per-node", 2, "optim.warmup_steps=0"]
    submit += ["model.num_key_value_heads=null", "data.sources.stdlib.path=" + data.split("=")[1]]
    assert "train.micro_batch x ranks (4 x 6 = 24)" in answer(*submit, "--nodes", 3, code=2)
    assert "--nodes is 0; expected at least 1" in answer(*submit, "--nodes", 0, code=2)
    assert "/nowhere: no such folder" in answer(*submit, "data.sources.x.path=/nowhere", code=2)
    assert "--time is 00:02:00, but Slurm signals its end 300 s before" in answer(*submit, "--time", "00:02:00", code=2)
    assert "expected at least 30 s" in answer(*submit, "train.time_limit=20", code=2)
    assert "sbatch is not installed here; use a login node" in answer(*submit, "--test-only", code=2)
    shown = answer(*submit, "--dry-run")
    assert "memory / rank" in shown and "sbatch --parsable" in shown
    assert not (tmp_path / "run").exists()


def test_a_run_outside_slurm_takes_orders_too(tmp_path: Path) -> None:
    assert "is not a run folder" in answer("stop", tmp_path, code=2)
    (tmp_path / "config.yaml").touch()
    for words, name in ((["save"], "SAVE"), (["stop"], "SAVE_AND_STOP"), (["stop", "--now"], "STOP")):
        assert f"wrote {tmp_path / name}" in answer(*words, tmp_path)
        assert (tmp_path / name).exists()
    assert "expected a running job of Slurm" in answer("requeue", tmp_path, code=2)


def test_config_gives_a_value_a_group_or_all() -> None:
    ask = ["config", "quickstart", "run_dir=a b"]
    assert answer(*ask, "--get", "run_dir") == "a b\n"
    assert "data.sources.stdlib.path=runs/quickstart/shards\n" in answer(*ask, "--get", "data.sources")
    assert yaml.safe_load(answer(*ask))["run_dir"] == "a b"
    assert "--get train.stepz: a run has no such key" in answer(*ask, "--get", "train.stepz", code=2)


def test_templates_are_written_for_a_site_to_edit_and_its_edits_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "slurm"
    shown = answer("templates", folder)
    assert f"wrote {len(list(SLURM.iterdir()))} files to {folder}" in shown and "sbatch slurm/train.sbatch" in shown
    for path in SLURM.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
        assert os.access(folder / path.name, os.X_OK) == os.access(path, os.X_OK)
    edited = (folder / "train.sbatch").read_text().replace("##SBATCH --partition=PARTITION", "#SBATCH --partition=gpu")
    (folder / "train.sbatch").write_text(edited)
    (folder / "site.sh").unlink()
    (folder / "mine.sh").touch()
    said = answer("templates", folder, code=2)
    assert "holds train.sbatch with other content; nothing was written" in said and "--overwrite" in said
    assert not (folder / "site.sh").exists() and (folder / "train.sbatch").read_text() == edited
    assert "wrote 2 files" in answer("templates", folder, "--overwrite") and (folder / "mine.sh").exists()
    assert (folder / "train.sbatch").read_bytes() == (SLURM / "train.sbatch").read_bytes()
    assert "wrote 0 files" in answer("templates", folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(path.name for path in SLURM.iterdir()), "mine.sh"]
    )


def test_a_template_that_is_a_link_is_replaced_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "shared.sh").write_text("of all clusters")
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "site.sh").symlink_to(tmp_path / "shared.sh")
    (folder / "rank.sh").symlink_to(tmp_path / "nowhere")
    assert "holds rank.sh, site.sh with other content" in answer("templates", folder, code=2)
    answer("templates", folder, "--overwrite")
    assert (tmp_path / "shared.sh").read_text() == "of all clusters" and not (tmp_path / "nowhere").exists()
    assert not (folder / "site.sh").is_symlink() and (folder / "rank.sh").is_file()


def test_templates_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "slurm" / "site.sh").mkdir(parents=True)
    for folder in (tmp_path / "file", "/proc/templates", tmp_path / "slurm"):
        for flags in ([], ["--overwrite"]):
            said = answer("templates", folder, *flags, code=2)
            assert said.startswith("error: ") and said.count("\n") == 1 and str(folder) in said


def test_a_run_is_submitted_with_the_templates_of_its_site(tmp_path: Path) -> None:
    settings = [f"run_dir={tmp_path}/run", "data.sources.x.path=x", "train.steps=1", "train.global_batch=2"]
    config, site = load(RunConfig, None, settings), tmp_path / "ours"
    with pytest.raises(ConfigError, match=r"ours: no train\.sbatch in it; `ponder-scale templates .*ours` writes it"):
        Submission(config, DEEPSPEED_CONFIGS / "zero3.json", Resources(), site)
    answer("templates", site)
    text = (site / "train.sbatch").read_text()
    (site / "train.sbatch").write_text(text.replace("--signal=B:USR2@300", "--signal=B:USR2@900"))
    (site / "modules.sh").write_text("module load cuda")
    with pytest.raises(SubmitError, match=r"900 s before"):
        Submission(config, DEEPSPEED_CONFIGS / "zero3.json", Resources(time="10"), site).check_time()
    keep_code(tmp_path / "kept", site)
    for name in ("train.sbatch", "modules.sh"):
        for folder in ("slurm", "ponder_scale/_files/slurm"):
            assert (tmp_path / "kept" / "code" / folder / name).read_bytes() == (site / name).read_bytes()


@pytest.mark.parametrize("ignored", [True, False])
def test_a_package_that_lies_in_a_checkout_of_others_is_kept_whole_and_not_called_theirs(
    ignored: bool, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    installed = copy_of_the_clone(tmp_path / "theirs" / "site-packages", "ponder_scale", "data_pipeline")
    for name in ("slurm", "deepspeed_configs"):  # as a wheel has them
        (installed / "ponder_scale/_files" / name).unlink()
        shutil.copytree(REPOSITORY / name, installed / "ponder_scale/_files" / name)
    git = ["git", "-C", str(tmp_path / "theirs"), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "theirs" / ".gitignore").write_text("site-packages\n" if ignored else "")
    for words in (["init", "-q"], ["add", ".gitignore"], ["commit", "-qm", "theirs"]):
        subprocess.check_call([*git, *words])
    call = f"from pathlib import Path; from ponder_scale.runs.submit import keep_code; keep_code(Path({str(kept)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.check_call([sys.executable, "-c", call], cwd=tmp_path, env=environment)
    for name in ("ponder_scale/cli.py", "data_pipeline/cli.py", "slurm/rank.sh", "ponder_scale/_files/slurm/rank.sh"):
        assert (kept / "code" / name).read_bytes()
    assert (kept / "commit.txt").read_text() == f"unknown: version {__version__}, not a git checkout\n"
