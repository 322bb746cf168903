"""Act on steps that are not right, on ranks whose weights differ and on ranks that are slow.

RUN/evidence/    a file for each bad step (its numbers, sequences, losses by rank) and for each difference of weights
RUN/rewinds.json the rewinds of the run and the sequences that each leaves out, which every later attempt reads
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist

from ponder_scale.checkpoint.index import step_name
from ponder_scale.config import HealthConfig
from ponder_scale.data.loader import Loader
from ponder_scale.errors import UNHEALTHY, UnhealthyError
from ponder_scale.files.write import write_whole
from ponder_scale.train.console import folded
from ponder_scale.train.measure.metrics import Metrics, StepTally
from ponder_scale.train.survive.health import Health
from ponder_scale.train.survive.watchdog import TIMED, Watch, straggler
from ponder_scale.train.zero.engine import Engine
from ponder_scale.train.zero.replicas import divergence, replicated

logger = logging.getLogger(__name__)

EVIDENCE, REWINDS = "evidence", "rewinds.json"


class Incidents:
    """Acts on what `Health` finds. Collective: every rank calls every method."""

    def __init__(
        self, run_dir: Path, config: HealthConfig, engine: Engine, loader: Loader, health: Health, metrics: Metrics
    ) -> None:
        self._run_dir, self._config = run_dir, config
        self._engine, self._loader, self._health, self._metrics = engine, loader, health, metrics
        # the first sequence of each step since the last save
        self._begins: deque[int] = deque(maxlen=config.rewind_skip_steps)

    def begin_step(self) -> None:
        """Note where the data of the coming step begin. Called before they are taken."""
        self._begins.append(self._loader.consumed)

    def saved(self) -> None:
        """Note that this step is saved: a rewind leaves out no sequences from before it."""
        self._begins.clear()

    def treat(self, step: int, tally: StepTally) -> bool:
        """Record the finding of a step that has just been judged, and keep the evidence.

        Returns whether the run has to go back to its newest checkpoint.

        Raises:
            UnhealthyError: too many steps in a row were skipped, or there were too many rewinds.
        """
        finding = self._health.finding
        assert finding is not None
        sequences = [self._begins[-1], self._loader.consumed]
        values = {**finding.values(), "sequences": sequences, "skips": self._health.skips}
        skipped = "" if finding.treatment == "warn" else "; no update"
        self._warn("step %d, sequences %d to %d: %s: %s%s", step, *sequences, finding.kind, finding, skipped)
        self._keep(step, values, tally)
        rewind = finding.treatment == "rewind"
        self._metrics.log_event("alarm" if finding.treatment == "warn" else finding.treatment, step, **values)
        try:
            self._health.check(step)
        except UnhealthyError as error:
            self._give_up(step, str(error))
        if not rewind:
            return False
        skip = [self._begins[0], self._loader.consumed]
        rewinds = self._engine.agreed(_read(self._run_dir / REWINDS))
        if len(rewinds) >= self._config.max_rewinds:
            self._give_up(step, f"step {step}: {finding}; no rewind is left after {len(rewinds)} (health.max_rewinds)")
        if self._engine.rank == 0:
            _write(self._run_dir / REWINDS, [*rewinds, {"time": time.time(), "step": step, "skip": skip}])
        self._warn("going back to the newest checkpoint; sequences %d to %d are left out from now on", *skip)
        return True

    def compare_replicas(self, step: int) -> None:
        """Compare the weights that every rank holds whole.

        Raises:
            UnhealthyError: they differ.
        """
        engine = self._engine
        tensors = replicated(engine.deepspeed, engine.zero_stage)
        found = divergence(tensors, engine.rank, engine.world_size, engine.total, engine.device)
        if found is None:
            return
        hosts = self._hosts()
        ranks = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in found.ranks)
        first = ", ".join(found.tensors[:3])
        message = f"step {step}: {ranks} no longer has the weights of the other ranks: {first}"
        if not found.majority:
            message += "; no majority of the ranks agrees, so it may be another rank that is wrong"
        values = {"kind": "replicas differ", "ranks": found.ranks, "hosts": hosts, "tensors": found.tensors[:100]}
        self._metrics.log_event("alarm", step, **values, message=message)
        if engine.rank == 0:
            _write(self._run_dir / EVIDENCE / f"replicas-{step:08d}.json", {"step": step, **values})
        self._give_up(step, message + "; remove that node and start again from the newest checkpoint before this step")

    def name_straggler(self, step: int, watch: Watch, *, first: bool) -> None:
        """Compare the seconds of all ranks since the last call. Record the slowest rank if it is much slower.

        Args:
            first: this was the first step of the attempt. Its times are not typical, so they are not compared.
        """
        own = torch.tensor(watch.phase_seconds())
        seconds = torch.zeros(self._engine.world_size, len(own))
        seconds[self._engine.rank] = own
        if self._config.straggler_factor is None or first:
            return
        phases = TIMED if self._engine.zero_stage < 3 else TIMED[:1]
        found = straggler(self._engine.total(seconds).tolist(), self._config.straggler_factor, phases)
        if found is not None:
            self._metrics.log_event("straggler", step, **found)
            self._warn("step %d: rank %d is slow in %s: %.1f s, but the median is %.1f s", step, *found.values())

    def _warn(self, message: str, *values: Any) -> None:
        # All ranks come here, and the console shows the warnings of every rank.
        if self._engine.rank == 0:
            for line in folded(message % values if values else message):
                logger.warning("%s", line)

    def _keep(self, step: int, values: dict[str, Any], tally: StepTally) -> None:
        sums = tally.sums()
        by_rank = torch.zeros(self._engine.world_size, len(sums), device=sums.device)
        by_rank[self._engine.rank] = sums
        means = [tally.means(row) for row in self._engine.total(by_rank)]
        hosts = self._hosts()
        if self._engine.rank != 0:
            return
        losses = [row.pass_losses for row in means]
        ranks = [{"rank": rank, "host": hosts[rank], "pass_losses": losses[rank]} for rank in range(len(losses))]
        _write(self._run_dir / EVIDENCE / f"{step_name(step)}.json", {"step": step, **values, "ranks": ranks})

    def _hosts(self) -> list[str]:
        hosts: list[Any] = [None] * self._engine.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        return hosts

    def _give_up(self, step: int, message: str) -> None:
        self._metrics.log_event("end", step, reason=message, exit_code=UNHEALTHY)
        raise UnhealthyError(message)


def left_out(run_dir: Path) -> list[list[int]]:
    """The ranges [first, end) of sequences that rewinds of this run leave out."""
    return [rewind["skip"] for rewind in _read(run_dir / REWINDS)]


def _read(path: Path) -> list[dict[str, Any]]:
    return orjson.loads(path.read_bytes()) if path.is_file() else []


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, orjson.dumps(content, option=orjson.OPT_INDENT_2))  # orjson writes nan and infinity as null
