"""Builds that are killed, at any moment and with any workers, and end as if they never were."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.build.parallel import Tasks
from data_pipeline.cli import main
from data_pipeline.read.units import PLAN, Plan
from data_pipeline.write.output import WORK
from ponder_scale.shards.manifest import verify
from tests.data_pipeline.builds import arguments, contents, make_texts, write_jsonl

SETTINGS = ["shard_bytes=100000", "backend=reference", "lease_seconds=1", "max_bad_fraction=0.01"]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = write_jsonl(tmp_path_factory.mktemp("corpus") / "web.jsonl", make_texts(20_000))
    with path.open("a") as stream:
        stream.write('{"text": 7}\n{"text": \n{"text": ""}\n')
    return path


@pytest.fixture(scope="module")
def expected(corpus, tiny_tokenizer, tmp_path_factory):
    """The files of an uninterrupted build by one worker."""
    out = tmp_path_factory.mktemp("expected") / "out"
    assert main(arguments(corpus, tiny_tokenizer, out, *SETTINGS, "workers=1")) == 0
    assert len(list(out.glob("train-*.bin"))) > 15
    return comparable(out)


def comparable(out: Path) -> dict[str, bytes]:
    """The content of each file; of the manifest without the command, which names its folder and its workers."""
    assert verify(out) == []
    files = contents(out)
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["checksum"], manifest["provenance"]["command"]
    return {**files, "manifest": json.dumps(manifest).encode()}


def start(arguments: list[str], *launcher: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, sys.executable, "-m", "data_pipeline.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the build and all its workers; it may have ended by then."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def journals(out: Path) -> int:
    return len(list((out.with_name("out.partial") / WORK / "shards").glob("*.json")))


def wait_for(process: subprocess.Popen, out: Path, done: int) -> None:
    """Until so many units are done, or the process has ended."""
    while process.poll() is None and journals(out) < done:
        time.sleep(0.005)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_makes_the_same_bytes(corpus, tiny_tokenizer, tmp_path, expected, workers):
    out = tmp_path / "out"
    assert main(arguments(corpus, tiny_tokenizer, out, *SETTINGS, f"workers={workers}")) == 0
    assert comparable(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("seed", range(3))
def test_a_build_killed_at_random_moments_ends_with_the_same_bytes(corpus, tiny_tokenizer, tmp_path, expected, seed):
    random_ = random.Random(seed)
    out = tmp_path / "out"
    for _ in range(4):
        workers = random_.randint(1, 3)
        process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS, f"workers={workers}"))
        wait_for(process, out, journals(out) + random_.randint(0, 5))
        time.sleep(random_.uniform(0, 0.3))
        kill(process)
        if process.returncode != -signal.SIGKILL:
            break
        assert not out.exists()
    assert main(arguments(corpus, tiny_tokenizer, out, *SETTINGS, f"workers={random_.randint(1, 3)}")) == 0
    assert comparable(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_state_that_a_kill_can_leave_is_gone_on_from(corpus, tiny_tokenizer, tmp_path, expected, monkeypatch):
    """The moments between two steps on disk, each made by stopping there."""
    same = arguments(corpus, tiny_tokenizer, tmp_path / "out", *SETTINGS, "workers=1")

    class Stop(BaseException):
        pass

    def stopping(function, after: bool):
        def stop(*values, **named):
            if after:
                function(*values, **named)
            raise Stop

        return stop

    for name, after in [
        ("data_pipeline.build.begin.save", False),
        ("data_pipeline.build.begin.choose", False),
        ("data_pipeline.build.begin.Plan", False),
        ("data_pipeline.build.parallel.sync_folder", False),
        ("data_pipeline.write.output.sync_folder", True),
        ("data_pipeline.write.manifest.Ledger.close", True),
        ("data_pipeline.build.finish.write_inputs", True),
        ("data_pipeline.build.finish.seal", False),
        ("data_pipeline.build.finish.seal", True),
        ("data_pipeline.build.begin.publish", False),
    ]:
        module, _, attribute = name.rpartition(".")
        target = sys.modules.get(module) or sys.modules["data_pipeline.write.manifest"].Ledger
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, stopping(getattr(target, attribute), after))
            with pytest.raises(Stop):
                main(same)
        assert not (tmp_path / "out").exists()
    assert main(same) == 0
    assert comparable(tmp_path / "out") == expected


def test_units_that_are_done_are_not_done_again(corpus, tiny_tokenizer, tmp_path):
    out = tmp_path / "out"
    process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS, "workers=1"))
    wait_for(process, out, 5)
    kill(process)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("train-0000[0-2].bin")}
    assert len(done) == 3
    assert main(arguments(corpus, tiny_tokenizer, out, *SETTINGS)) == 0
    assert {path: (out / path.name).stat().st_mtime_ns for path in done} == done


def test_a_killed_worker_is_reported_and_its_unit_goes_to_another(corpus, tiny_tokenizer, tmp_path, expected):
    out = tmp_path / "out"
    process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS, "workers=2"))
    wait_for(process, out, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"worker {workers[0]} was killed by signal 9; another worker takes over its unit" in output
    assert comparable(out) == expected


def test_workers_end_with_the_process_that_started_them(corpus, tiny_tokenizer, tmp_path):
    out = tmp_path / "out"
    process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS, "workers=2"))
    wait_for(process, out, 1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and not _zombie(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists() and not _zombie(pid)]
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_ends_quietly_when_it_is_told_to_and_goes_on(
    corpus, tiny_tokenizer, tmp_path, expected, number, workers
):
    """Slurm and terminals send the signal to all processes at once."""
    out = tmp_path / "out"
    process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS, f"workers={workers}"))
    wait_for(process, out, 1)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else 130), output
    assert "Traceback" not in output and output.count("error: ") == 1
    assert main(arguments(corpus, tiny_tokenizer, out, *SETTINGS)) == 0
    assert comparable(out) == expected


def test_a_worker_that_is_told_to_end_does_so_quietly(corpus, tiny_tokenizer, tmp_path, expected):
    out = tmp_path / "out"
    process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS, "workers=2"))
    wait_for(process, out, 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output, output
    assert comparable(out) == expected


def _zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow  # as many workers as there are processors
def test_an_unfinished_build_of_something_else_is_not_thrown_away(corpus, tiny_tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    bad = arguments(corpus, tiny_tokenizer, out, "shard_bytes=40000", "max_bad_fraction=0")
    assert main(bad) == 2
    assert "2 of 20,003 records are bad (1 field is not a string, 1 malformed JSON)" in capsys.readouterr().err
    assert main([*bad, "seed=3", "append_eod=false"]) == 2
    assert "unfinished build from other settings (append_eod, seed); restore these" in capsys.readouterr().err
    assert main([*bad, "max_bad_fraction=0.01"]) == 0  # nothing is read again
    assert verify(out) == []
    shutil.rmtree(out)
    assert main(bad) == 2
    assert main([*bad, "seed=3", "overwrite=true", "max_bad_fraction=0.01"]) == 0


def test_a_restart_with_fewer_tasks_loses_no_documents(corpus, tiny_tokenizer, tmp_path, expected):
    """datatrove marks completion by rank: half of the ranks done, restarted with as many ranks, it says done."""
    out = tmp_path / "out"
    process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS, "workers=4"))
    wait_for(process, out, 8)
    kill(process)
    assert main(arguments(corpus, tiny_tokenizer, out, *SETTINGS, "workers=2")) == 0
    assert comparable(out) == expected


def test_one_bad_line_neither_hangs_nor_ends_the_file(tiny_tokenizer, tmp_path, capsys):
    """Megatron's script hangs on a bad line, its fast one ends the file there with exit code 0."""
    lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    for bad in ('{"text": "cut', '{"other": 1}', '{"text": null}', '{"text": 3}', '{"text": "\\ud800"}'):
        path = tmp_path / "web.jsonl"
        path.write_text("\n".join([*lines[:50], bad, *lines[50:]]))
        out = tmp_path / "out"
        assert main(arguments(path, tiny_tokenizer, out, "max_bad_fraction=0.02")) == 0
        printed = capsys.readouterr().out
        assert "dropped from web: 1 " in printed
        counts = json.loads((out / "manifest.json").read_text())["provenance"]["sources"]["web"]
        assert counts["documents"] == 100
        assert main(arguments(path, tiny_tokenizer, out, "overwrite=true")) == 2
        assert "1 of 101 records are bad" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "out.partial")
        shutil.rmtree(out)


def mpi(ranks: int, *more: str) -> list[str]:
    return [str(BIN / "mpiexec"), *more, "-n", str(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_mpi_ranks_make_the_bytes_of_one_process(corpus, tiny_tokenizer, tmp_path, expected, ranks):
    out = tmp_path / "out"
    process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS), *mpi(ranks))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert comparable(out) == expected
    last = [line for line in output.splitlines() if "MB/s" in line][-1]  # of what all ranks have done
    assert "(100%)" in last and re.search(r"[\d,]+ documents/s, [\d.]+ M tokens/s", last), output


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The process of each rank, by the environment that the launcher gives it."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
            rank = next((int(entry[9:]) for entry in environment if entry.startswith(b"PMI_RANK=")), None)
            mine = _ancestor(int(folder.name), launcher.pid)
            if rank is not None and mine and b"-m\0data_pipeline.cli" in command and b"sh\0-c" not in command:
                found[rank] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def _ancestor(pid: int, of: int) -> bool:
    while pid > 1 and pid != of:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == of


@pytest.mark.parametrize("taken_over", [True, False], ids=["on the same run", "on the next run"])
def test_the_units_of_a_killed_rank_are_taken_over(corpus, tiny_tokenizer, tmp_path, expected, taken_over):
    out = tmp_path / "out"
    # MPICH's launcher ends all ranks when it learns that one was killed; a shell between them keeps it from that.
    stays = ["sh", "-c", f'"$0" "$@" || while [ ! -d {out} ]; do sleep 0.05; done']
    launcher = [*mpi(3), *stays] if taken_over else mpi(3)
    process = start(arguments(corpus, tiny_tokenizer, out, *SETTINGS), *launcher)
    wait_for(process, out, 3)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    if taken_over:
        assert out.exists(), output
    else:
        assert process.returncode != 0
        assert main(arguments(corpus, tiny_tokenizer, out, *SETTINGS, "workers=2")) == 0
    assert comparable(out) == expected


def test_a_rank_that_cannot_begin_ends_them_all_with_one_clear_line(tiny_tokenizer, tmp_path):
    process = start(arguments(tmp_path / "nowhere.jsonl", tiny_tokenizer, tmp_path / "out"), *mpi(2))
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "sources.web.path is" in output and "no such file" in output and "Traceback" not in output


def test_ranks_do_not_wait_for_ever_for_one_that_does_not_start(corpus, tiny_tokenizer, tmp_path):
    code = "from data_pipeline import cli; from data_pipeline.build import parallel"
    code += "; parallel._ARRIVAL_SECONDS = 2; cli.main()"
    words = shlex.join([sys.executable, "-c", code, *arguments(corpus, tiny_tokenizer, tmp_path / "out")])
    late = f'[ "$PMI_RANK" = 0 ] || sleep 60; exec {words}'
    done = subprocess.run([*mpi(2), "sh", "-c", late], capture_output=True, text=True, timeout=40)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert "Timeout (0:00:02)!" in done.stderr and "_wait_until_all_ranks_have_started" in done.stderr


def test_a_launcher_that_does_not_fit_the_mpi_library_is_named(corpus, tiny_tokenizer, tmp_path):
    """srun --mpi=none makes every task rank 0 of 1, silently."""
    process = start(arguments(corpus, tiny_tokenizer, tmp_path / "out"), SLURM_STEP_NUM_TASKS="4")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "4 ranks were started, but MPI sees 1" in output and "--mpi=pmi2" in output


def test_a_claim_that_nobody_keeps_fresh_is_anybodys(tmp_path):
    held = Tasks(tmp_path, "shards", [1, 1], lease_seconds=5)
    assert list(held.free([0])) == [0]
    other = Tasks(tmp_path, "shards", [1, 1], lease_seconds=5)
    assert list(other.free([0])) == []
    old = time.time() - 60
    os.utime(tmp_path / "claims" / "shards" / "000000", (old, old))
    assert list(other.free([0, 1])) == [0, 1]


def test_the_plan_does_not_depend_on_workers(corpus, tiny_tokenizer, tmp_path):
    plans = []
    for workers in (1, 3):
        out = tmp_path / str(workers) / "out"
        assert (
            main(
                arguments(corpus, tiny_tokenizer, out, "shard_bytes=40000", f"workers={workers}", "max_bad_fraction=0")
            )
            == 2
        )
        plan = Plan(out.with_name("out.partial") / WORK / PLAN)
        plans.append([plan.unit(i) for i in range(len(plan))])
    assert plans[0] == plans[1]
