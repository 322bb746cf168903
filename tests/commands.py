"""`ponder-scale` as a user types it, in a process forked from one that has imported torch and transformers.

That import is most of what a small command costs. A command that starts ranks starts them as anywhere else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ponder_scale.train.launch import RANK_VARIABLES
from tests.ranks import PLAIN, REPOSITORY, run_ranks


def run_command(
    *words: Any, folder: Path = REPOSITORY, timeout: float = 300.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a command printed in a folder, and its exit code; one of another program runs in a new process."""
    command = [str(word) for word in words]
    if command[0] != "ponder-scale":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, **PLAIN, "PATH": path, **environment}
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as printed:
        case = {"command": command, "folder": str(folder), "environment": environment, "printed": printed}
        ((code,),) = run_ranks(_ponder_scale, [case], world_size=1, timeout=timeout)
        assert isinstance(code, int), (command, code)
        out, err = (Path(printed, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, code, out, err)


def _ponder_scale(case: dict[str, Any]) -> int:
    from ponder_scale.cli import main

    for name in RANK_VARIABLES:
        del os.environ[name]
    os.environ.update(case["environment"])
    os.chdir(case["folder"])
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(case["printed"], name), os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = case["command"]
    # by which the command leaves where torch is loaded; the code is wanted here
    leave, os._exit = os._exit, sys.exit  # type: ignore[assignment]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os._exit = leave
    return 0
