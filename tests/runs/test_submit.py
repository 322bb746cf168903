"""What `ponder-scale submit` and its kin say without a cluster; with one, see tests/slurm."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from ponder_scale.config import RunConfig
from ponder_scale.runs.submit import HOME, Resources, Submission, SubmitError, keep_code
from ponder_scale.settings import load
from tests.commands import run_command
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
    submission = Submission(
        config, HOME / "deepspeed_configs/zero3.json", Resources(2, 4, 1, "1:00:00", ("--qos=a b",))
    )
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
        Submission(config, HOME / "deepspeed_configs/zero3.json", Resources(1, 1, 0, time, options)).check_time()

    for fine in (None, "6", "360", "6:00", "1-00", "UNLIMITED", "INFINITE", "nonsense"):  # sbatch judges the last
        check(fine)
    check("00:02:00", "--signal=B:USR2@50")
    check("5", "--time=1:00:00")
    for short in ("2", "00:05:00", "5:59"):
        with pytest.raises(SubmitError, match=rf"--time is {short}: .*300 s before \(B:USR2@300\).* at least 360 s"):
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
    for name in ("ponder_scale/cli.py", "data_pipeline/cli.py", "deepspeed_configs/zero3.json", "slurm/site.sh"):
        assert (tmp_path / "code" / name).read_bytes() == (HOME / name).read_bytes()
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
    assert "--time is 00:02:00: Slurm signals its end 300 s before" in answer(*submit, "--time", "00:02:00", code=2)
    assert "expected at least 30 s" in answer(*submit, "train.time_limit=20", code=2)
    assert "sbatch is not here; submit from a login node" in answer(*submit, "--test-only", code=2)
    shown = answer(*submit, "--dry-run")
    assert "memory / rank" in shown and "sbatch --parsable" in shown
    assert not (tmp_path / "run").exists()


def test_a_run_outside_slurm_takes_orders_too(tmp_path: Path) -> None:
    assert "is no run folder" in answer("stop", tmp_path, code=2)
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
