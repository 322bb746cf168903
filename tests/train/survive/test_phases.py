"""What may come at any time comes in every phase of a step: a rank killed, told to end, or hung; nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.errors import AGAIN, HUNG
from ponder_scale.settings import load
from ponder_scale.train.survive import signals
from tests.faults import Fault
from tests.ranks import KILLED, run_ranks
from tests.train.runs import assert_same_run, overrides, resumed_from

pytestmark = pytest.mark.faults

STEP = 3  # in whose phases it comes; the step before is saved
SETTINGS = ["train.steps=5", f"evaluate.every_steps={STEP}", "train.deepspeed=zero1"]
LATE = ("evaluate", "save")  # come when the ranks have already agreed on how the step ends
PHASES = ("start", "load", "data", "forward", "backward", "step", *LATE)


def train_to_a_phase(case: dict[str, Any]) -> int:
    """Train; where rank 1 reaches the phase of the case, of step 3, this comes to it: kill, end or hang."""
    from ponder_scale.train import loop, start
    from ponder_scale.train.survive import watchdog

    torch.set_num_threads(1)
    signals.install()
    watchdog.GRACE_SECONDS = 12.0  # on a busy machine the other rank finds out so much later
    if "phase" in case and os.environ["RANK"] == "1":
        happen, enter = _once(case["what"]), watchdog.Watch.enter

        def entering(self: Any, phase: str, step: int | None = None) -> None:
            enter(self, phase, step)
            if self._where == (case["phase"], STEP):
                happen()

        watchdog.Watch.enter = entering  # type: ignore[method-assign]
        before = {"start": (start, "init_distributed"), "load": (start, "resume")}.get(case["phase"])
        if before is not None:
            original = getattr(*before)
            setattr(*before, lambda *arguments: (happen(), original(*arguments))[1])
    return loop.train(load(RunConfig, None, case["overrides"]))


def _once(what: str) -> Any:
    """What happens at the first call."""
    calls: list[int] = []

    def happen() -> None:
        calls.append(1)
        if len(calls) > 1:
            return
        if what == "hang":
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
        time.sleep(0.1)

    return happen


@pytest.fixture(scope="module")
def whole(shards: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(train_to_a_phase, [{"overrides": overrides(run_dir, shards, *SETTINGS)}]) == [[0, 0]]
    return run_dir


def injured(what: str, phases: tuple[str, ...], folder: Path, shards: Any, *more: str) -> dict[str, list[Any]]:
    """What the ranks of a run said whose rank 1 was injured in the phase; each is then trained to its end."""
    cases = []
    for phase in phases:
        case = {"overrides": overrides(folder / phase, shards, *SETTINGS)}
        if phase == "load":  # of a run that has something to load
            run_ranks(train_to_a_phase, [{**case, "phase": "backward", "what": "kill"}])
        slow = ["health.slow_seconds=12"] if phase in LATE and what == "hang" else []
        cases += [{"overrides": [*case["overrides"], *more, *slow], "phase": phase, "what": what}, case]
    results = run_ranks(train_to_a_phase, cases, lanes=2 if what == "hang" else len(phases) // 2)
    for phase, resumed in zip(phases, results[1::2], strict=True):
        assert resumed == [0, 0], (phase, resumed)
    return dict(zip(phases, results[::2], strict=True))


def last_start(run_dir: Path) -> int | None:
    """The step of the checkpoint from which the last attempt went on."""
    folder = resumed_from(run_dir)[-1]
    return None if folder is None else int(folder[-8:])


def whole_step(phase: str) -> int | None:
    """The last step that is saved when a rank is lost in the phase; a step is saved before it is evaluated."""
    return {"start": None, "evaluate": STEP}.get(phase, STEP - 1)


def test_a_rank_killed_in_any_phase_costs_at_most_the_step_under_way(
    shards: Any, whole: Path, tmp_path: Path, fault: Fault
) -> None:
    for phase, ranks in injured("kill", PHASES, tmp_path, shards).items():
        assert ranks[1] == KILLED and ranks[0] != 0, (phase, ranks)
        assert_same_run(tmp_path / phase, whole)
        last = last_start(tmp_path / phase)
        assert last == whole_step(phase), (phase, last)
        after = "begins anew" if last is None else f"from the checkpoint of the step{' before' * (last < STEP)}"
        fault("SIGKILL of rank 1", phase, detected="by the launcher", after=after, lost="nothing saved")


def test_a_rank_told_to_end_in_any_phase_ends_all_at_one_step(
    shards: Any, whole: Path, tmp_path: Path, fault: Fault
) -> None:
    for phase, ranks in injured("end", PHASES, tmp_path, shards).items():
        assert ranks == [AGAIN, AGAIN], (phase, ranks)
        assert_same_run(tmp_path / phase, whole)
        last = last_start(tmp_path / phase)
        expected = {"start": None, "load": STEP - 1, **dict.fromkeys(LATE, STEP + 1)}.get(phase, STEP)
        assert last == expected, (phase, last)
        fault("SIGTERM to rank 1", phase, detected="all ranks, same step", after="saved; exit code 85", lost="nothing")


def test_a_rank_that_hangs_in_any_phase_ends_all(shards: Any, whole: Path, tmp_path: Path, fault: Fault, capfd) -> None:
    phases = tuple(phase for phase in PHASES if phase not in ("start", "load"))  # where the limit is that of a start
    for phase, ranks in injured("hang", phases, tmp_path, shards, "health.hang_seconds=12").items():
        assert ranks == [{"error": f"exit code {HUNG}"}] * 2, (phase, ranks)
        assert_same_run(tmp_path / phase, whole)
        assert last_start(tmp_path / phase) == whole_step(phase), phase
    said = capfd.readouterr().out
    for phase in phases:
        assert "rank 1: no progress for " in said and f"s in {phase} of step {STEP}; stacks:" in said, phase
        fault(
            "rank 1 hangs", phase, detected="by every rank", after="stacks of all; exit code 86", lost="nothing saved"
        )
