"""Real ranks for tests: each case runs in freshly forked processes that form a gloo group on this machine.

The heavy imports happen once for all tests of a worker, in a process that waits for jobs and forks.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ponder_scale.train.launch import RANK_VARIABLES, free_port

REPOSITORY = Path(__file__).parents[1]
DONE = "the job has ended\n"
KILLED = {"error": "exit code -9"}
PEERS_SECONDS = 30.0  # for the other ranks to end after one has failed; some would wait for it for ever
PLAIN = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
FIXED = {**PLAIN, "PYTHONPATH": str(REPOSITORY)}
HEAVY = (  # what a rank that trains imports in any case, or an engine by itself
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "ponder_scale.train.loop",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
)


def run_ranks(
    function: Callable[..., Any], cases: list[Any], world_size: int = 2, timeout: float = 120.0, lanes: int = 1
) -> list[Any]:
    """For each case what `function(case)` returned on every rank: a list of JSON values, one per rank.

    Cases come one after the other, in as many equal parts at the same time as there are `lanes`.

    An exception on a rank appears as {"error": text}, another end as {"error": "exit code N"}, negative for a signal.
    Ranks that hang are killed: {"error": "hung"}, after `timeout` seconds a case, or soon after another has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results, printed = Path(folder, "results.json"), Path(folder, "printed")
        job = {
            "function": [function.__module__, function.__qualname__],
            "cases": cases,
            "world": world_size,
            "timeout": timeout,
            "lanes": lanes,
            "environment": {**os.environ, **FIXED},
            "results": str(results),
            "printed": str(printed),
        }
        # the C library reads these when a process starts
        allocation = tuple((name, value) for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
        forker = _forker(threading.get_ident(), allocation)
        assert forker.stdin is not None and forker.stdout is not None
        forker.stdin.write(json.dumps(job) + "\n")
        forker.stdin.flush()
        for line in forker.stdout:  # some packages print when they are imported
            if line == DONE:
                break
        said = printed.read_text() if printed.is_file() else "the process that forks has died"
        if said:
            print(said)  # pytest shows it where the test fails
        assert results.is_file(), said
        return json.loads(results.read_text())


@cache
def _forker(_thread: int, _allocation: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The process that forks for a thread of the tests, started in the present environment."""
    forker = subprocess.Popen(
        [sys.executable, "-m", "tests.ranks"],
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **FIXED},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(forker.kill)
    return forker


def _fork(function: Callable[..., Any], case: Any, rank: int, world_size: int, port: str, out: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        values = (str(rank), str(world_size), str(rank), "127.0.0.1", port)
        os.environ.update(zip(RANK_VARIABLES, values, strict=True))
        out.write_text(json.dumps(function(case)))
        code = 0
    except BaseException as error:
        traceback.print_exc()
        out.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_case(function: Callable[..., Any], case: Any, world_size: int, timeout: float) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, str(rank)) for rank in range(world_size)]
        port = free_port()
        pids = [_fork(function, case, rank, world_size, port, outs[rank]) for rank in range(world_size)]
        deadline, waiting = time.monotonic() + timeout, set(pids)
        ends = dict.fromkeys(pids, "hung")
        while waiting and time.monotonic() < deadline:
            for pid in list(waiting):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    waiting.remove(pid)
                    ends[pid] = f"exit code {os.waitstatus_to_exitcode(status)}"
                if ended and status:
                    deadline = min(deadline, time.monotonic() + PEERS_SECONDS)
            time.sleep(0.02)
        for pid in waiting:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        pairs = zip(outs, ends.values(), strict=True)
        return [json.loads(out.read_text()) if out.exists() else {"error": end} for out, end in pairs]


def _work(job: dict[str, Any]) -> None:
    """The cases of a job, each lane in a process of its own that has the job's environment."""
    os.environ.clear()
    os.environ.update(job["environment"])
    printed = os.open(job["printed"], os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    module, name = job["function"]
    function = getattr(importlib.import_module(module), name)
    cases, outs = job["cases"], [Path(f"{job['results']}-{lane}") for lane in range(job["lanes"])]
    for lane, out in enumerate(outs):
        if os.fork():
            continue
        mine = cases[lane * len(cases) // len(outs) : (lane + 1) * len(cases) // len(outs)]
        out.write_text(json.dumps([_run_case(function, case, job["world"], job["timeout"]) for case in mine]))
        return
    for _ in outs:
        os.wait()
    Path(job["results"]).write_text(json.dumps([result for out in outs for result in json.loads(out.read_text())]))


def main() -> None:
    """Fork for each job, a line of standard input; say when it has ended."""
    for name in HEAVY:
        importlib.import_module(name)
    import deepspeed

    _ = deepspeed.ops.__compatible_ops__  # found by calling compilers, at the first look
    gc.freeze()  # what is imported is no garbage: collections in the forks pass over it
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                _work(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(pid, 0)
        print(DONE, end="", flush=True)


if __name__ == "__main__":
    main()
