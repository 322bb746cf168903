"""Count the cost of a start, a step, a save and a resumed start as ranks and shard files grow, on real ranks.

Forked gloo ranks on this machine train a tiny model for a few steps. In each phase every rank counts:

- opens, stats and changes of names in the run folder and the shards
- collectives
- bytes and connections of its TCP sockets

The counts of several world sizes give the law by which each grows. The law gives the counts of larger worlds.
"""

from __future__ import annotations

import collections
import functools
import gc
import json
import logging
import os
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.shards.format import TOKENIZER, ShardWriter, dtype_for
from ponder_scale.shards.manifest import Manifest, ShardInfo, seal

NOISE = 0.05  # share of a count that may vary, because it depends on the clock
PHASES = ("start", "step", "save", "resume", "elastic")
LEGS = ("start", "resume", "elastic")  # elastic: resume on half of the ranks
COLUMNS = ("opens", "stats", "names", "written", "collectives", "MB sent", "sockets")
WORLDS = (8, 64, 512, 4096)  # world sizes to extrapolate to
FILES = (1, 100, 10_000, 50_000)
_NAMES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("barrier", "gather", "scatter", "reduce", "all_to_all", "all_to_all_single", "send", "recv", "isend", "irecv"),
)
_SENT, _TCP_INFO = 120, 11  # byte offset of the acknowledged bytes in Linux's struct tcp_info, and the option's number
Counts = dict[str, float]


class Counters:
    """Counts what this process does from now on, by phase."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(f"{root}{os.sep}" for root in roots)
        self.phase = "start"
        self.counts: dict[str, Counts] = collections.defaultdict(lambda: dict.fromkeys(COLUMNS, 0.0))
        self._sent = 0.0
        sys.addaudithook(self._heard)
        os.stat = self._counted("stats", os.stat)
        os.lstat = self._counted("stats", os.lstat)
        for name in _COLLECTIVES:
            self._watch_collective(name)

    def enter(self, phase: str) -> None:
        """End the current phase and begin another."""
        sent, sockets = _sockets()
        self.counts[self.phase]["MB sent"] += (sent - self._sent) / 1e6
        self.counts[self.phase]["sockets"] = max(sockets, self.counts[self.phase]["sockets"])
        self._sent, self.phase = sent, phase

    def _add(self, what: str, path: Any) -> None:
        if threading.current_thread().name == "heartbeat" or not isinstance(path, str | os.PathLike):
            return  # the number of heartbeats depends on the clock
        if os.fspath(path).startswith(self._roots):
            self.counts[self.phase][what] += 1

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._add("opens", arguments[0])
            if isinstance(arguments[2], int) and arguments[2] & os.O_CREAT:
                self._add("written", arguments[0])
        elif event in ("os.listdir", "os.scandir"):
            self._add("opens", f"{os.fspath(arguments[0])}{os.sep}" if isinstance(arguments[0], str) else arguments[0])
        elif event in _NAMES:
            self._add("names", arguments[0])

    def _counted(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(path: Any, *arguments: Any, **options: Any) -> Any:
            self._add(what, path)
            return function(path, *arguments, **options)

        return counted

    def _watch_collective(self, name: str) -> None:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        function = getattr(distributed_c10d, name)

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            self.counts[self.phase]["collectives"] += 1
            return function(*arguments, **options)

        setattr(distributed_c10d, name, watched)
        setattr(dist, name, watched)


def measure(worlds: Sequence[int], files: Sequence[int], *, stage: int = 3) -> str:
    """Count, and return the tables.

    Args:
        worlds: numbers of ranks, at least three, ascending.
        files: numbers of shard files, at least two, ascending. They are counted with the fewest ranks.

    Raises:
        ConfigError: too few numbers, or a rank failed.
    """
    if len(set(worlds)) < 3 or len(set(files)) < 2 or min(*worlds, *files) < 1:
        raise ConfigError("bench scale: expected at least three numbers of ranks and two of shard files")
    by_world = {world: count(world, files[0], stage) for world in sorted(set(worlds))}
    by_files = {number: count(min(worlds), number, stage) for number in sorted(set(files))[1:]}
    by_files[files[0]] = by_world[min(worlds)]
    return "\n\n".join([_worlds_table(by_world), _files_table(by_files, min(worlds), max(worlds))])


def count(world: int, files: int, stage: int, legs: Sequence[str] = LEGS) -> dict[str, Counts]:
    """Counts of each phase, summed over the ranks. `sockets` is the largest number of any rank.

    Each leg continues the run of the leg before it.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        make_shards(folder / "shards", files)
        sums: dict[str, Counts] = {}
        for leg in legs:
            ranks = max(1, world // 2) if leg == "elastic" else world
            for name, counts in _run(folder, ranks, world, stage, leg).items():
                if leg == "start" or name == "start":
                    sums[name if leg == "start" else leg] = counts
        return {name: sums[name] for name in PHASES if name in sums}


def make_shards(folder: Path, files: int, *, vocabulary: int = 50, tokens: int = 4096) -> None:
    """Write `files` training shards and a held-out shard of random documents. Each has `tokens` tokens, a multiple of
    16.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    splits: dict[str, list[ShardInfo]] = {}
    for split, number in (("train", files), ("heldout", 1)):
        splits[split] = []
        for index in range(number):
            writer = ShardWriter(folder, f"{split}-{index:05d}", vocabulary)
            documents = generator.integers(1, vocabulary, (tokens // 16, 16))
            documents[:, -1] = 0
            writer.add(documents.ravel(), np.full(len(documents), 16))
            splits[split].append(writer.close())
    (folder / TOKENIZER).mkdir()
    (folder / TOKENIZER / "tokenizer.json").write_text("{}")
    seal(folder, Manifest(dtype_for(vocabulary).name, vocabulary, 0, None, "a" * 64, splits))


def _overrides(folder: Path, world: int, stage: int, leg: str) -> list[str]:
    return [
        *(f"run_dir={folder / 'run'}", f"data.sources.all.path={folder / 'shards'}", "data.seq_len=16"),
        *("model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=2", "model.pondering_steps=1"),
        *("model.num_attention_heads=2", f"train.global_batch={world}", "train.micro_batch=1", "train.precision=fp32"),
        *(f"train.deepspeed=zero{stage}", f"train.steps={ {'start': 3, 'resume': 4, 'elastic': 5}[leg] }"),
        *("checkpoint.every_steps=3", "evaluate.every_steps=null", "health.hang_seconds=null", "log.every_steps=1"),
        *("optim.schedule=constant", "train.sanity_step=false"),
    ]


def _run(folder: Path, ranks: int, world: int, stage: int, leg: str) -> dict[str, Counts]:
    from ponder_scale.train.launch import RANK_VARIABLES, free_port

    _import_once()
    port, pids = free_port(), []
    sys.stdout.flush()
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            values = (str(rank), str(ranks), str(rank), "127.0.0.1", port)
            os.environ.update(zip(RANK_VARIABLES, values, strict=True))
            _rank(folder, _overrides(folder, world, stage, leg), folder / f"counts-{rank}")
        pids.append(pid)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(ends):
        raise ConfigError(f"bench scale: {sum(map(bool, ends))} of {ranks} ranks failed; their messages are above")
    found = [json.loads((folder / f"counts-{rank}").read_text()) for rank in range(ranks)]
    names = {name for counts in found for name in counts}
    return {
        name: {
            column: (max if column == "sockets" else sum)(counts.get(name, {}).get(column, 0) for counts in found)
            for column in COLUMNS
        }
        for name in names
    }


@functools.cache
def _import_once() -> None:
    """Import what every rank needs before ranks are forked, because dozens of separate imports take minutes."""
    import deepspeed
    import transformers.models.llama.modeling_llama

    import ponder_scale.train.loop

    _ = deepspeed.ops.__compatible_ops__, transformers.models.llama.modeling_llama, ponder_scale.train.loop
    gc.freeze()
    logging.disable(logging.WARNING)  # log lines of a run would appear between the tables


def _rank(folder: Path, overrides: list[str], out: Path) -> None:
    """Train as one rank, write the counts, and end the process."""
    code = 1
    try:
        torch.set_num_threads(1)
        from ponder_scale.train import loop
        from ponder_scale.train.survive.watchdog import Watch

        counters = Counters([folder / "shards", folder / "run"])
        enter = Watch.enter

        def entered(self: Watch, phase: str, step: int | None = None) -> None:
            # a step begins with its data; the first two steps contain one-time costs
            if phase in ("data", "evaluate", "save"):
                early = phase == "data" and step is not None and step < 3
                counters.enter(f"step {step}" if early else "step" if phase == "data" else phase)
            enter(self, phase, step)

        Watch.enter = entered  # type: ignore[method-assign]
        loop.train(load(RunConfig, None, overrides))
        counters.enter("end")
        out.write_text(json.dumps(counters.counts))
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _sockets() -> tuple[float, int]:
    """Acknowledged bytes that this process has sent over its open TCP connections, and their number."""
    sent, number = 0, 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            if not str(path.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _SENT + 8)
            (bytes_,) = struct.unpack_from("<Q", info, _SENT)
        except (OSError, struct.error):
            continue
        sent, number = sent + bytes_, number + 1
    return float(sent), number


def law(points: dict[int, float]) -> Callable[[int], float]:
    """The polynomial of lowest degree, up to 2, that fits each of the last three counts to within 5 percent.

    The tolerance allows for counts that depend on the clock. A count that rises and falls depends on the clock alone,
    such as looks at request files. For it, the law is the largest count.
    """
    last = dict(sorted(points.items())[-3:])
    x, y = np.array(list(last), dtype=float), np.array(list(last.values()))
    for degree in (0, 1, 2):
        found = np.polynomial.Polynomial.fit(x, y, degree)
        if np.all(np.abs(found(x) - y) <= NOISE * np.abs(y) + 1e-9):
            break
    if degree == 2 and found.convert().coef[-1] < 0:
        return lambda value: float(y.max())
    return lambda value: max(0.0, float(found(value)))


def _worlds_table(by_world: dict[int, dict[str, Counts]]) -> str:
    worlds = list(by_world)
    heads = [*(f"{world}" for world in worlds), *(f"*{world:,}*" for world in WORLDS if world > max(worlds))]
    lines = ["Over all ranks, by their number; *extrapolated*. Sockets are those of one rank.", ""]
    lines += [f"| phase | what | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for phase in PHASES:
        for column in COLUMNS:
            points = {world: by_world[world][phase][column] for world in worlds}
            if any(points.values()):
                grown = law(points)
                cells = [*points.values(), *(grown(world) for world in WORLDS if world > max(worlds))]
                lines.append(f"| {phase} | {column} | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _files_table(by_files: dict[int, dict[str, Counts]], ranks: int, most: int) -> str:
    numbers = sorted(by_files)
    heads = [*(f"{number}" for number in numbers), *(f"*{number:,}*" for number in FILES if number > max(numbers))]
    lines = [f"Over {ranks} ranks, by the number of training shards; *extrapolated*.", ""]
    lines += [f"| phase | what | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for phase in PHASES:
        for column in ("opens", "stats"):
            points = {number: by_files[number][phase][column] for number in numbers}
            if any(points.values()):
                grown = law(points)
                cells = [*points.values(), *(grown(number) for number in FILES if number > max(numbers))]
                lines.append(f"| {phase} | {column} | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.2g}"
