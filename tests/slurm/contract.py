"""A stand-in for `ponder-scale` where the job script alone is under test: it counts to a number, at ten a second.

It keeps what slurm/train.sbatch relies on: exit codes, signals, request files, heartbeats, `latest`. Without torch, a
rank starts in a tenth of a second. Arguments: run_dir=..., to=NUMBER, and save_every, crash_at and hang_at (once),
crash_every, code.
"""

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

AGAIN = 85


def main() -> None:
    """`config ... --get run_dir`, or `train ...`."""
    values = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
    run_dir = Path(values["run_dir"])
    if sys.argv[1] == "config":
        print(run_dir)
        return
    stop: list[int] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))
    if "code" in values:
        sys.exit(int(values["code"]))
    rank = int(os.environ["RANK"])
    latest, begun = run_dir / "latest", 0
    faults = {name: run_dir / f"{name}-done" for name in ("crash", "hang")}
    before = {name for name, done in faults.items() if done.exists()}
    if latest.exists():
        begun = int(latest.read_text())
    print(f"rank {rank} begins at {begun} on {os.uname().nodename}, meets at {os.environ['MASTER_ADDR']}", flush=True)
    for step in range(begun + 1, int(values["to"]) + 1):
        time.sleep(0.1)
        if rank == 0:
            write(run_dir / "heartbeat" / "rank-00000.json", str(step))
        if step - begun == int(values.get("crash_every", -1)):
            os._exit(1)
        for name in faults.keys() - before:
            if step == int(values.get(f"{name}_at", -1)) or faults[name].exists():  # then all ranks do
                faults[name].touch()
                wait_for_ever() if name == "hang" else os._exit(1)
        asked = [name for name in ("STOP", "SAVE_AND_STOP") if (run_dir / name).exists()]
        if rank == 0 and (stop or asked == ["SAVE_AND_STOP"] or step % int(values.get("save_every", 1000)) == 0):
            write(latest, str(step))
        if stop or asked:
            time.sleep(0.3)  # where the trainer has a barrier, which breaks if another rank has crashed
            if "crash_every" in values or ("crash" not in before and faults["crash"].exists()):
                os._exit(1)
            for name in asked:
                (run_dir / name).unlink(missing_ok=True)
            sys.exit(AGAIN if stop else 0)


def wait_for_ever() -> None:
    """Where a stack shows it."""
    while True:
        time.sleep(1)


def write(path: Path, content: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_text(content)
    path.with_suffix(".tmp").replace(path)


main()
