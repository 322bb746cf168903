"""The real `ponder-scale`, on a machine with faults: what the environment asks for happens in the training loop.

STEP_SECONDS=0.5: until the job is requeued, each step takes that much longer. CRASH=10:1 or HANG=10:1: in step 10
rank 1 dies or stands still, once (the file named by FAULT_DONE remembers).
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from ponder_scale.train.survive import signals


def main() -> None:
    """As `ponder-scale`."""
    if sys.argv[1:2] == ["train"]:
        signals.install()
        from ponder_scale.train import loop

        learning_rate = loop.learning_rate

        def slowly(step: int, *arguments: Any) -> float:  # called by every rank, once in each step
            if "SLURM_RESTART_COUNT" not in os.environ:
                time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
            fail(step)
            return learning_rate(step, *arguments)

        loop.learning_rate = slowly
    from ponder_scale.cli import main as command_line

    command_line()


def fail(step: int) -> None:
    """The fault of this step and rank, if there is one."""
    for fault in ("CRASH", "HANG"):
        if os.environ.get(fault) == f"{step}:{os.environ['RANK']}":
            done = Path(os.environ["FAULT_DONE"])
            if done.exists():
                continue
            done.touch()
            if fault == "CRASH":
                os._exit(1)
            stand_still()


def stand_still() -> None:
    """A hang, by a name that a stack shows."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
