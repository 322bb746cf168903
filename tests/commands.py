"""`ponder-scale` and `python -m benchmarks` as a user types them, forked from a process that has loaded the libraries.

The import of torch and transformers is most of what a small command costs. The ranks that a command starts are forked
too. Those of a training that starts over, and of torchrun, import it all again.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ponder_scale.train import launch
from ponder_scale.train.launch import RANK_VARIABLES
from tests.ranks import PLAIN, REPOSITORY, run_ranks

LEAVE = os._exit
BENCHMARKS = ["python", "-m", "benchmarks"]
CLIENT = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    with server.makefile("rw") as stream:
        print(json.dumps([sys.argv[1:], os.getcwd()]), file=stream, flush=True)
        code, out, err = json.loads(stream.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


def run_command(
    *words: Any, folder: Path = REPOSITORY, timeout: float = 300.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a command printed in a folder, and its exit code; one of another program runs in a new process."""
    command = [str(word) for word in words]
    if command[0] != "ponder-scale" and command[:3] != BENCHMARKS:
        variables = {**_variables(), **environment}
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as printed:
        case = {"command": command, "folder": str(folder), "environment": environment, "printed": printed}
        ((code,),) = run_ranks(_ponder_scale, [case], world_size=1, timeout=timeout)
        assert isinstance(code, int), (command, code)
        out, err = (Path(printed, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, code, out, err)


def run_script(*words: Any, folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """As `run_command`, of a script: each `ponder-scale` in it is a client, for which this process runs the command."""
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as server:
        client, address = Path(place, "ponder-scale"), f"{place}/socket"
        client.write_text(f"#!{sys.executable}\n{CLIENT.format(address=address)}")
        client.chmod(0o755)
        server.bind(address)
        server.listen()
        files = [Path(place, name) for name in ("stdout", "stderr")]
        with files[0].open("w") as out, files[1].open("w") as err:
            script = subprocess.Popen(command, cwd=folder, env=_variables(place), stdout=out, stderr=err)
        deadline = time.monotonic() + timeout
        while script.poll() is None and time.monotonic() < deadline:
            if select.select([server], [], [], 0.1)[0]:
                _serve(server)
        script.kill()
        return subprocess.CompletedProcess(command, script.wait(), *(file.read_text() for file in files))


def _variables(*folders: str) -> dict[str, str]:
    """Of a new process: commands are looked for in these folders, then beside this Python."""
    path = os.pathsep.join([*folders, str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **PLAIN, "PATH": path}


def _serve(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection, connection.makefile("rw") as stream:
        words, folder = json.loads(stream.readline())
        done = run_command("ponder-scale", *words, folder=Path(folder))
        print(json.dumps([done.returncode, done.stdout, done.stderr]), file=stream, flush=True)


def _ponder_scale(case: dict[str, Any]) -> int:
    if case["command"][0] == "ponder-scale":
        from ponder_scale.cli import main
    else:
        from benchmarks.__main__ import main  # type: ignore[assignment]

    for name in RANK_VARIABLES:
        del os.environ[name]
    os.environ.update(case["environment"])
    os.chdir(case["folder"])
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(case["printed"], name), os.O_WRONLY | os.O_CREAT), stream)
    command = case["command"]
    sys.argv = command[2:] if command[:3] == BENCHMARKS else command
    launch.subprocess = SimpleNamespace(Popen=ForkedRank)  # type: ignore[assignment]
    # by which the command leaves where torch is loaded; the code is wanted here
    os._exit = sys.exit  # type: ignore[assignment]
    try:
        return main() or 0  # type: ignore[func-returns-value]
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os._exit = LEAVE


class ForkedRank:
    """What `launch` uses of `subprocess.Popen`, but for the new interpreter."""

    def __init__(
        self, command: list[str], env: dict[str, str], start_new_session: bool, preexec_fn: Callable[[], None]
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if not self._pid:
            assert start_new_session
            os.setsid()
            preexec_fn()
            self._run(command, env)

    def _run(self, command: list[str], env: dict[str, str]) -> None:
        from ponder_scale.cli import main

        os._exit = LEAVE
        try:
            logging.getLogger("ponder_scale").handlers.clear()  # of the command
            os.environ.clear()
            os.environ.update(env)
            sys.orig_argv, sys.argv = command, command[2:]
            main()
        finally:
            os._exit(1)

    def poll(self) -> int | None:
        if self.returncode is None:
            self._take(*os.waitpid(self._pid, os.WNOHANG))
        return self.returncode

    def wait(self) -> None:
        if self.returncode is None:
            self._take(*os.waitpid(self._pid, 0))

    def _take(self, pid: int, status: int) -> None:
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)

    def send_signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
