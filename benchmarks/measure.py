"""How the benches measure: medians of runs that take turns, and peak memory in a process of its own.

Peak memory of a CPU run is the high-water mark of the resident set (VmHWM) of a fresh process, reset after libraries
have been loaded and warmed up on a problem of no size, less what was resident then. glibc is told to give freed blocks
of more than 64 KiB back at once, as allocators of devices can: otherwise its moving threshold keeps some of them, by an
accident of sizes. On a GPU it is the peak of torch's allocator.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ponder_scale.errors import ConfigError

MIB = 2**20
DTYPES = ("float32", "bfloat16", "float16")


def device_name(device: str, threads: int) -> str:
    """For the head of a table."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread(s)"


def check_numbers(**numbers: int) -> None:
    """Raise ConfigError for an argument below 1, by the name of its flag."""
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {number}; expected at least 1")


def check_dtype(dtype: str) -> None:
    """Raise ConfigError for a dtype that is not offered."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Median(NamedTuple):
    """Of the runs of one variant."""

    seconds: float  # on the clock
    processor_s: float  # of this process on all processors
    marks: tuple[float, ...]  # on the clock, from the start to each mark that the variant set


def medians(variants: Mapping[str, Callable[[], Sequence[float] | None]], runs: int, device: str) -> dict[str, Median]:
    """Run the variants in turns, so that what else the machine does falls on all of them.

    A variant may return marks, of `time.perf_counter`. The first round warms up and is not counted.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in variants}
    for number in range(runs + 1):
        for name, function in variants.items():
            gc.collect()
            wait(device)
            processor, start = time.process_time(), time.perf_counter()
            marks = function() or []
            wait(device)
            end, processor = time.perf_counter(), time.process_time() - processor
            if number:
                found[name].append([end - start, processor, *(mark - start for mark in marks)])
    columns = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    return {name: Median(values[0], values[1], tuple(values[2:])) for name, values in columns.items()}


def in_fresh_process(module: str, threads: int, **arguments: Any) -> Any:
    """What `module`, run with these arguments as JSON, printed last: a JSON value. NaN where there is no Linux /proc.

    The module ends with `answer(function)`.
    """
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    command = [sys.executable, "-W", "ignore", "-m", module, json.dumps({**arguments, "threads": threads})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(function: Callable[..., Any]) -> None:
    """The other end of `in_fresh_process`."""
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(arguments.pop("threads"))
    print(json.dumps(function(**arguments)))


def reset_peak() -> float:
    """Let the peak of this process begin anew; what is resident now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def resident(field: str) -> float:
    """VmRSS, resident now, or VmHWM, its peak, in MiB. Unlike getrusage's, this peak is not the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024
