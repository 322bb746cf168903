"""Commands that need no torch start without it: importing it takes ten times as long as all that they do.

What is imported is counted, not timed. Each command runs to its end on real files, in an interpreter of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_pipeline.builds import arguments, make_texts, write_jsonl
from tests.ranks import PLAIN, REPOSITORY
from tests.tiny import TinyShards

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "triton", "pandas", "wandb"}
MOST = 700  # modules of Python's own, of numpy and of ours; torch alone brings 1,500 more
RUN = """
import sys
from {program} import main
try:
    code = main({words!r})
except SystemExit as end:
    code = end.code
print(code or 0, len(sys.modules), *sorted({heavy!r} & sys.modules.keys()))
"""
PROGRAMS = {"ponder-scale": "ponder_scale.cli", "ponder-data": "data_pipeline.cli", "benchmarks": "benchmarks.__main__"}


def imported(program: str, words: list[str], error: str = "") -> list[str]:
    """The heavy packages that a command has loaded when it ends, well or with this error."""
    script = RUN.format(program=PROGRAMS[program], words=words, heavy=HEAVY)
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("RANK", None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ended, modules, *heavy = done.stdout.splitlines()[-1].split()
    assert (ended == "2" and error in done.stderr) if error else ended == "0", (words, done.stdout, done.stderr)
    assert int(modules) < MOST, (words, modules, heavy)
    return heavy


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_given_without_torch(program: str) -> None:
    assert imported(program, ["--help"]) == []


def test_commands_of_login_nodes_need_no_torch(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("train: {steps: 10}\n")
    (run_dir / "metrics.jsonl").write_text("")
    for words in (
        ["config", "quickstart", "data.sources.stdlib.path=/nowhere"],
        ["templates", str(tmp_path / "templates")],
        ["status", str(run_dir)],
        *([name, str(run_dir)] for name in ("save", "stop")),
    ):
        assert imported("ponder-scale", words) == [], words


def test_what_starts_the_ranks_of_a_machine_loads_no_torch_itself(tmp_path: Path, tiny_shards: TinyShards) -> None:
    """Every rank loads it; the process that starts them only waits. It has looked at all else when it refuses this."""
    run = [f"run_dir={tmp_path / 'run'}", f"data.sources.stdlib.path={tiny_shards().folder}", "train.global_batch=3"]
    assert imported("ponder-scale", ["train", "quickstart", *run, "--nproc", "2"], "train.global_batch is 3") == []


def test_the_data_pipeline_needs_no_torch(tmp_path: Path, tiny_tokenizer: Path) -> None:
    corpus, shards = write_jsonl(tmp_path / "corpus.jsonl", make_texts(40)), tmp_path / "shards"
    build = arguments(corpus, tiny_tokenizer, shards, "workers=1")
    for words in (
        ["plan", *build[1:]],
        build,
        ["inspect", str(shards)],
        ["verify", str(shards)],
        ["pack", str(shards), "--seq-len", "16"],
        ["train-tokenizer", str(corpus), "--vocab-size", "300", "--out", str(tmp_path / "tokenizer")],
    ):
        assert imported("ponder-data", words) == [], words


def test_a_run_with_adamw_does_not_load_torchs_compiler(tmp_path: Path) -> None:
    """DeepSpeed asks whether the optimizer is its Muon, and compiles that as it imports it to ask."""
    script = (
        "import sys; from pathlib import Path; from benchmarks.start import tiny_run\n"
        "from ponder_scale.train.loop import train\n"
        f"assert train(tiny_run(Path({str(tmp_path / 'tiny')!r}), 1, toy=True, bf16=False)) == 0\n"
        "names = ('deepspeed.runtime.zero.muon.muon_optimizer', 'torch._inductor.compile_fx')\n"
        "print(*(name in sys.modules for name in names))"
    )
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True False"
