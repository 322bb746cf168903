"""What a user can mend is one line on standard error and exit code 2: places, flags, slips, models, folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import cli as data_cli
from ponder_scale import cli
from ponder_scale.config import RunConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.errors import CheckpointError, ConfigError, UserError
from ponder_scale.export.folder import making
from ponder_scale.files.places import check_file, check_folder
from ponder_scale.files.write import write_whole
from ponder_scale.runs.attempts import owner
from ponder_scale.runs.report import report
from ponder_scale.runs.status import status
from ponder_scale.runs.submit import Resources, Submission, SubmitError, stop
from ponder_scale.settings import load
from ponder_scale.settings.commandline import outlive_readers
from ponder_scale.setup.build import build_model, model_configuration
from tests.commands import run_command
from tests.tiny import TinyShards

PLACES = {  # what stands in the way of a folder, and what is said of it
    "file": "which is a file",
    "file/under": "file is a file",
    "/dev/null/under": "/dev/null is a file",
    "/proc/under": "nothing can be written in /proc",
    "dangling": "is a link to",
    "dangling/under": "is a link to",
    "x" * 300: "File name too long",
    "$NOWHERE/under": "no environment variable NOWHERE",
    "~nobody-of-this-name/x": "there is no user",
    "": "is empty",
}
ORDINARY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
READS = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # Python's own files may be root's alone


def error(capsys: pytest.CaptureFixture[str], *words: Any, program: str = "ponder-scale") -> str:
    """The one line that a command answers."""
    arguments = [str(word) for word in words]
    if arguments[:1] == ["train"]:  # takes over signals
        done = run_command(program, *arguments, folder=Path.cwd())
        code, said = done.returncode, done.stderr
    elif program == "ponder-data":
        code, said = data_cli.main(arguments), capsys.readouterr().err
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        code, said = ended.value.code, capsys.readouterr().err
    assert code == 2 and len(said.splitlines()) == 1 and said.startswith("error: "), (code, said)
    return said


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch is loaded the command leaves by os._exit, which would end the tests."""
    monkeypatch.setattr(os, "_exit", sys.exit)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "far")
    return tmp_path


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left(
    place: str, here: Path, tiny_shards: TinyShards, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.iterdir())
    data = f"data.sources.stdlib.path={tiny_shards().folder}"
    said = error(capsys, "train", "quickstart", f"run_dir={place}", data)
    assert "run_dir" in said and PLACES[place] in said
    assert PLACES[place] in error(capsys, "compare", "quickstart", f"run_dir={place}", data, "--report")
    assert PLACES[place] in error(capsys, "submit", "quickstart", f"run_dir={place}", data)
    assert PLACES[place] in error(capsys, "export", "run", place)
    assert PLACES[place] in error(capsys, "import-reference", "folder", place)
    assert PLACES[place] in error(capsys, "export-reference", "folder", place)
    source = ["sources.a.kind=text", "sources.a.path=file", f"tokenizer={tiny_tokenizer}"]
    said = error(capsys, "build", *source, f"out={place}", program="ponder-data")
    assert said.startswith("error: out is") and (PLACES[place] in said or "which exists and is not a finished" in said)
    train = ("train-tokenizer", "file", "--vocab-size", 300, "--out", place)
    assert PLACES[place] in error(capsys, *train, program="ponder-data")
    assert sorted(here.iterdir()) == before and (here / "file").read_text() == "mine"


@pytest.mark.skipif(os.getuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="nobody to become")
def test_an_ordinary_user_without_permission_is_told_the_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):  # pytest's are its user's alone
        if folder.stat().st_uid == os.getuid() and folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    become = [*ORDINARY, *READS] if os.getuid() == 0 else []
    for program, words in (
        ("ponder_scale.cli", ["train", "quickstart", f"run_dir={shut / 'run'}"]),
        ("ponder_scale.cli", ["train", "quickstart", f"run_dir={shut}"]),
        ("ponder_scale.cli", ["submit", "quickstart", f"run_dir={shut / 'run'}"]),
        ("ponder_scale.cli", ["export", "run", str(shut / "out")]),
        ("ponder_scale.cli", ["evaluate", "ppl", "x", "--data", "x", "--json", str(shut / "out.json")]),
        ("data_pipeline.cli", ["train-tokenizer", "x", "--vocab-size", "300", "--out", str(shut / "out")]),
    ):
        command = [*become, sys.executable, "-m", program, *words]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": "/tmp"})
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"nothing can be written in {shut}: Permission denied" in done.stderr
    assert list(shut.iterdir()) == []


def test_a_folder_that_can_be_made_is_let_pass_and_not_made(here: Path) -> None:
    for place in ("new", "new/deep/er", "", ".", here, "link/new"):
        (here / "real").mkdir(exist_ok=True)
        if not (here / "link").exists():
            (here / "link").symlink_to(here / "real")
        check_folder(Path(place), "it")
    assert not (here / "new").exists() and list((here / "real").iterdir()) == []
    check_file(here / "new.json", "it")
    check_file(here / "file", "it")
    assert not (here / "new.json").exists()
    with pytest.raises(ConfigError, match=r"it is .*real, which is a folder"):
        check_file(here / "real", "it")
    with pytest.raises(ConfigError, match=r"there is no folder .*new; make it"):
        check_file(here / "new" / "x.json", "it")


def test_an_export_that_fails_on_the_way_says_so_and_leaves_nothing(here: Path) -> None:
    with pytest.raises(CheckpointError, match=r"out: cannot be created: .*No space left"), making(here / "out"):
        Path("/dev/full").write_text("x")
    with pytest.raises(ConfigError, match="is a link to"), making(here / "dangling"):
        pass
    assert sorted(path.name for path in here.iterdir()) == ["dangling", "file"]


def test_a_small_file_is_whole_or_as_it_was(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(here / "file", "new")
    assert (here / "file").read_text() == "new"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(here / "file", "newer")
    assert (here / "file").read_text() == "new"


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train quickstart --nproc 0", "--nproc is 0; expected at least 1"),
        ("train quickstart --nproc -1", "--nproc is -1; expected at least 1"),
        ("train quickstart --nproc two", "--nproc is 'two'; expected a whole number"),
        ("compare quickstart --nproc 0", "--nproc is 0; expected at least 1"),
        ("train quickstart --train.steps 10", "did you mean train.steps=10?"),
        ("train quickstart --train.steps=10", "did you mean train.steps=10?"),
        ("train quickstart --steps 10", "did you mean train.steps=10?"),
        ("train quickstart --lr 1e-3", "did you mean optim.lr=1e-3?"),
        ("train quickstart --nporc 2", "no flag --nporc; did you mean --nproc?"),
        ("train quickstart --frobnicate 2", "no flag --frobnicate; see ponder-scale train --help"),
        ("train quickstart train.steps 10", "override 'train.steps': expected key=value"),
        ("train train.steps=10", "expected a recipe before train.steps=10"),
        ("train quickstrat", "recipe quickstrat: no such file; did you mean quickstart?"),
        ("train", "the following arguments are required: recipe"),
        ("trian quickstart", "no command trian; did you mean train?"),
        ("exprot a b", "no command exprot; did you mean export?"),
        ("evaluate pll x", "no command pll; did you mean ppl?"),
        ("frobnicate", "no command frobnicate; expected one of init, train, plan"),
        ("", "the following arguments are required: COMMAND"),
        ("evaluate", "the following arguments are required: WHAT"),
        ("status a b", "too many words: b"),
        ("export a b --dtype bfloat", "--dtype is bfloat; did you mean bfloat16?"),
        ("plan quickstart --gpus 0", "--gpus is 0; expected at least 1"),
        ("plan quickstart --gpus 8,0", "--gpus is 0; expected at least 1"),
        ("plan quickstart --gpus 8,x", "--gpus is 'x'; expected a whole number"),
        ("plan quickstart --gpus 8,16 --failures", "--gpus is 8,16 with --failures; give one number of devices"),
        ("plan quickstart --hardware nowhere.json", "nowhere.json: cannot be read as a hardware file"),
        ("plan --gpus 8", "the following arguments are required: recipe"),
        ("plan quickstart --gpus-per-node 0", "--gpus-per-node is 0; expected at least 1"),
        ("plan quickstart --mfu nan", "--mfu is nan; expected a finite number"),
        ("plan quickstart --mfu 2", "--mfu is 2.0; expected at most 1"),
        ("plan quickstart --failures inf", "--failures is inf; expected a finite number"),
        ("submit quickstart --nodes 0", "--nodes is 0; expected at least 1"),
        ("evaluate ppl x --data y --sequences 0", "--sequences is 0; expected at least 1"),
        ("evaluate ppl x --data y --steps -1", "--steps is -1; expected at least 0"),
        ("evaluate tasks x --limit 0", "--limit is 0; expected at least 1"),
        ("evaluate tasks x --batch-size -2", "--batch-size is -2; expected at least 1"),
        ("generate x --prompt y --max-new-tokens 0", "--max-new-tokens is 0; expected at least 1"),
        ("generate x --prompt y --temperature nan", "--temperature is nan; expected a finite number"),
        ("evaluate ppl x --data a=$NOWHERE", "no environment variable NOWHERE"),
        ("status $NOWHERE/run", "run_dir is '$NOWHERE/run': there is no environment variable NOWHERE"),
        ("config quickstart --get train.stepz", "did you mean train.steps?"),
        ("config quickstart steps=3", "unknown key steps; did you mean train.steps?"),
    ],
)
def test_a_slip_on_the_command_line_is_answered(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    assert message in error(capsys, *words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("biuld x", "no command biuld; did you mean build?"),
        ("build --out x", "no flag --out: settings are given as key=value; did you mean out="),
        ("build --workers 2 out=x", "did you mean workers=2?"),
        ("inspect", "the following arguments are required: folder"),
        ("inspect x --samples -1", "--samples is -1; expected at least 0"),
        ("pack x --seq-len 1", "--seq-len is 1; expected at least 2"),
        ("plan --sample-mb 0 out=x", "--sample-mb is 0.0; expected more than 0"),
        ("train-tokenizer x --vocab-size 0 --out y", "--vocab-size is 0; expected at least 1"),
        ("build outt=x", "unknown key outt; did you mean out?"),
    ],
)
def test_a_slip_of_ponder_data_is_answered(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, *words.split(), program="ponder-data")


SHAPE = (
    *("run_dir=r", "train.steps=9", "train.global_batch=8", "data.sources.a.path=p", "model.hidden_size=64"),
    *("model.intermediate_size=64", "model.num_hidden_layers=1", "model.num_attention_heads=4", "model.vocab_size=32"),
)
ROTARY = "the rotary embedding turns pairs"


def try_model(*overrides: str) -> None:
    """Build a model and run it once, as a run would."""
    config = load(RunConfig, None, [*SHAPE, *overrides])
    configuration = model_configuration(config.model, vocab_size=32, seq_len=8, eod_id=0)
    model = build_model(configuration, 1)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=12", ROTARY),
        ("model.hidden_size=36", ROTARY),
        ("model.num_attention_heads=64", ROTARY),
        ("model.extra={head_dim: 7}", ROTARY),
        ("model.extra={head_dim: 0}", ROTARY),
        ("model.architecture=gpt_neox model.hidden_size=48", ROTARY),
        ("model.architecture=gpt_neox model.extra={rotary_pct: 0.01}", ROTARY),
        ("model.architecture=gpt_neox model.extra={rotary_pct: 3}", ROTARY),
        ("model.architecture=olmo2 model.hidden_size=20", ROTARY),
        (
            "model.num_key_value_heads=3",
            "model.num_key_value_heads is 3; expected a divisor of model.num_attention_heads (4)",
        ),
        ("model.num_key_value_heads=8", "expected a divisor of model.num_attention_heads (4)"),
        ("model.architecture=olmo2 model.num_key_value_heads=3", "expected a divisor of model.num_attention_heads (4)"),
        ("model.hidden_size=63", "expected a multiple of model.num_attention_heads (4)"),
        ("model.extra={head_dim: x}", "head_dim"),
        ("model.extra={hidden_act: foo}", "transformers has no 'foo'"),
        ("model.extra={hidden_act: 5}", "hidden_act"),
        ("model.extra={mlp_bias: 7}", "mlp_bias"),
        ("model.extra={initializer_range: x}", "initializer_range"),
        ("model.extra={initializer_range: .nan}", "model.extra.initializer_range is nan; expected a finite number"),
        ("model.extra={attention_dropout: 2}", "model.extra.attention_dropout is 2; expected a share"),
        ("model.extra={rope_parameters: {rope_type: yarn}}", "factor"),
        ("model.extra={rope_parameters: 3}", "rope_parameters"),
        ("model.extra={pad_token_id: 99}", "model: it cannot be built"),
        ("model.architecture=gpt2 model.extra={activation_function: x}", "transformers has no 'x'"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_it_runs(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        try_model(*override.replace(" model.", "\nmodel.").split("\n"))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_models_at_the_edge_of_these_rules_run() -> None:
    for override in ("model.hidden_size=8", "model.num_key_value_heads=2", "model.extra={head_dim: 6}"):
        try_model(override)
    try_model("model.architecture=gpt_neox", "model.hidden_size=32")
    try_model("model.architecture=gpt2", "model.hidden_size=12")


def test_a_missing_data_folder_names_its_key(capsys: pytest.CaptureFixture[str], here: Path, ended: None) -> None:
    words = ("quickstart", f"run_dir={here / 'run'}", "data.sources={web: {path: nowhere}}", "train.global_batch=32")
    expected = "data.sources.web.path: nowhere: no such folder"
    for command in (["train"], ["plan"], ["submit", "--dry-run"], ["compare", "--list"]):
        assert expected in error(capsys, command[0], *words, *command[1:])
    assert not (here / "run").exists()


def test_a_wrong_packing_or_data_are_told_in_words(tmp_path: Path, tiny_shards: TinyShards) -> None:
    def loader(*overrides: str, seed: int = 0) -> Loader:
        path = tiny_shards(seed=seed).folder
        words = [*SHAPE, f"data.sources.a.path={path}", "data.seq_len=16", *overrides]
        config = load(RunConfig, None, words)
        return Loader(config.data, open_sources(config.data), seed=1, global_batch=8, micro_batch=8)

    state = loader().state()
    for saved, said in (
        (
            {**state, "packing": "0123abcd"},
            "data.packing: the checkpoint has packing best-fit, but this run has concat, so",
        ),
        ({**state, "shards": "0123abcd"}, "data.sources: this run has other shards than the checkpoint, so"),
        ({**state, "weights": "0123abcd"}, "data.sources: this run has other weights than the checkpoint, so"),
    ):
        with pytest.raises(ConfigError) as refused:
            loader().restore(saved)
        assert said in str(refused.value) and "0123abcd" not in str(refused.value)


def submission(folder: Path) -> Submission:
    config = load(RunConfig, None, [*SHAPE, f"run_dir={folder}"])
    return Submission(config, Path("deepspeed_configs/zero1.json"), Resources())


def test_a_folder_of_another_name_among_the_submissions_is_passed_over(tmp_path: Path) -> None:
    for name in ("0001", "0001-kept", "0007 copy", "notes", "0x10"):
        (tmp_path / "submissions" / name).mkdir(parents=True)
    assert submission(tmp_path).folder.name == "0002"


def test_a_request_that_cannot_be_left_is_answered(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "SAVE_AND_STOP").symlink_to("/proc/nowhere/at/all")
    with pytest.raises(SubmitError, match="SAVE_AND_STOP cannot be written"):
        stop(tmp_path, save=True)


@pytest.mark.parametrize(
    "content", ["", "# nothing", "[]", "words", "train: {}", "train: {steps: many}", "{{{", "a: b: c"]
)
def test_an_empty_or_damaged_config_of_a_run_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "metrics.jsonl").write_text(
        '{"event": "step", "step": 1, "attempt": 1, "time": 1.0, "loss": 1.0, "tokens": 8}\n'
    )
    with pytest.raises(UserError, match=r"config\.yaml") as refused:
        status(tmp_path)
    assert "\n" not in str(refused.value)
    if content not in ("train: {}", "train: {steps: many}"):
        with pytest.raises(UserError, match=r"config\.yaml") as refused:
            report([tmp_path], tmp_path / "report.html")
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(RunConfig, tmp_path / "config.yaml")


def closed_pipe(*words: Any, program: str = "ponder_scale.cli") -> tuple[int, str]:
    """The exit code and the errors of a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", program, *map(str, words)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    return done.returncode, done.stderr


def test_a_closed_pipe_changes_no_exit_code_and_says_nothing(tmp_path: Path, tiny_shards: TinyShards) -> None:
    assert closed_pipe("config", "quickstart") == (0, "")
    assert closed_pipe("--help") == (0, "")
    (tmp_path / "config.yaml").write_text("train: {steps: 9}")
    assert closed_pipe("status", tmp_path) == (0, "")
    folder = tiny_shards().folder
    data = next(folder.glob("train-*.bin"))
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    code, said = closed_pipe("verify", folder, program="data_pipeline.cli")
    assert code == 2 and len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in said and "BrokenPipe" not in said


def test_the_log_of_a_run_outlives_its_reader() -> None:
    script = (
        "import logging, sys\nfrom ponder_scale import cli\n"
        "from ponder_scale.settings.commandline import outlive_readers\n"
        "outlive_readers()\ncli._log_to_stdout(logging.INFO, cli.Timed())\n"
        "[logging.getLogger('ponder_scale').info('step %d', n) for n in range(9)]\nprint('done', file=sys.stderr)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "done\n")


def test_streams_that_are_not_the_program_s_own_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    outlive_readers()
    assert sys.stdout is before


def test_what_stands_in_the_way_within_a_run_folder_is_named(here: Path, tiny_shards: TinyShards) -> None:
    data = f"data.sources.stdlib.path={tiny_shards().folder}"
    for name, said in (
        ("checkpoints", "which is a file"),
        ("heartbeat", "which is a file"),
        ("metrics.jsonl", "which is a folder"),
        ("config.yaml", "which is a folder"),
        ("attempt", "which is a folder"),
    ):
        run_dir = here / f"run-{name}"
        run_dir.mkdir()
        if "file" in said:
            (run_dir / name).write_text("mine")
        else:
            (run_dir / name).mkdir()
        done = run_command("ponder-scale", "train", "quickstart", f"run_dir={run_dir}", data)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"its {name} is {run_dir / name}, {said}" in done.stderr
    (here / "attempt").write_text("")
    with pytest.raises(CheckpointError, match="attempt: expected the number of an attempt"):
        owner(here)
