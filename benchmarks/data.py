"""`python -m benchmarks data` compares our tokenization with other programs on one corpus, in processor seconds.

Each contender runs in its own process on three inputs. One document gives its start-up time. A small part and the whole
of the corpus together give its speed without the start-up. Rounds are interleaved and medians taken, so that other work
on the machine affects all contenders alike.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.baselines import BASELINES, NEEDS
from ponder_scale.errors import ConfigError
from ponder_scale.shards.manifest import MANIFEST, read_manifest

SMALL = 8  # the small corpus is one in this many parts of the whole
REFERENCE = "per_document"  # the baseline of all ratios
ENGINES = ("gigatoken", "tiktoken", "reference")
LOADER = ("-m", "benchmarks.loader")  # Python's arguments for the loader's part, which may import torch


@dataclass
class Runs:
    """Processor seconds of one contender on each corpus, and its peak memory on the whole corpus, for each run."""

    one: list[float] = field(default_factory=list)
    small: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MB of its largest process
    engines: set[str] = field(default_factory=set)  # engines that did the work, for our builds


def bench(corpus: Path, tokenizer: Path, rounds: int) -> str:
    """The table: tokenization of a .jsonl by every installed contender, then the loader.

    Raises ConfigError if the corpus is too small to time or a contender fails.
    """
    if corpus.suffix != ".jsonl" or not corpus.is_file() or not (tokenizer / "tokenizer.json").is_file():
        raise ConfigError(f"bench: {corpus} and {tokenizer}: expected a .jsonl file and a folder with tokenizer.json")
    with tempfile.TemporaryDirectory(prefix="ponder-bench-") as folder:
        one, small, text = Path(folder, "one.jsonl"), Path(folder, "small.jsonl"), {}
        text["whole"], text["small"] = _shorten(corpus, one, small)
        contenders = [*(f"ponder-data, {engine}" for engine in ENGINES), *BASELINES]
        runs = {name: Runs() for name in contenders if _installed(name)}
        for _ in range(rounds):
            for name, times in runs.items():
                for path, into in ((one, times.one), (small, times.small), (corpus, times.whole)):
                    with tempfile.TemporaryDirectory(dir=folder) as place:
                        seconds, memory = _run(_command(name, path, tokenizer, Path(place, "out")), folder)
                        into.append(seconds)
                        times.engines |= _engines(Path(place, "out"))
                times.memory.append(memory)
        lines = list(_table(runs, text["small"] / 1e6, text["whole"] / 1e6))
        lines += _loader(corpus, tokenizer, Path(folder))
    return "\n".join(lines)


def _table(runs: dict[str, Runs], small: float, whole: float) -> Iterator[str]:
    speeds = {}
    for name, times in runs.items():
        took = statistics.median(times.whole) - statistics.median(times.small)
        if took <= 0:
            raise ConfigError(
                f"bench: {name} takes no measurable time for {whole:,.1f} MB of text; use a larger corpus"
            )
        speeds[name] = (whole - small) / took
    yield f"{'tokenization':<24}{'MB/CPU-s':>10}{'ratio':>8}{'start-up CPU-s':>16}{'peak MB':>9}"
    for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        start, memory = statistics.median(runs[name].one), statistics.median(runs[name].memory)
        yield f"{name:<24}{speed:>10.2f}{speed / speeds[REFERENCE]:>8.1f}{start:>16.2f}{memory:>9,.0f}"
        if (engines := runs[name].engines) and engines != {name.partition(", ")[2]}:
            yield f"  done by {' and '.join(sorted(engines))}, as the engine gives other tokens than this tokenizer"
    yield f"corpus: {whole:,.1f} MB of text; medians of {len(runs[REFERENCE].whole)} interleaved rounds"


def _loader(corpus: Path, tokenizer: Path, folder: Path) -> Iterator[str]:
    """The loader's measurements on shards of the corpus."""
    shards = folder / "shards"
    _run(_command("ponder-data, reference", corpus, tokenizer, shards), str(folder))
    documents, index = _index(shards)
    yield ""
    yield f"index: {index / max(1, documents):.1f} bytes a document"
    done = subprocess.run([sys.executable, *LOADER, str(shards)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"bench: the loader failed: {done.stderr.strip().splitlines()[-1]}")
    for row in json.loads(done.stdout):
        yield f"{row['name']:<44}{row['value']:>14,.1f} {row['unit']}"


def _index(shards: Path) -> tuple[int, int]:
    manifest = json.loads((shards / "manifest.json").read_bytes())
    infos = [info for split in manifest["splits"].values() for info in split]
    return sum(info["documents"] for info in infos), sum((shards / f"{i['name']}.idx").stat().st_size for i in infos)


def _shorten(corpus: Path, one: Path, small: Path) -> tuple[int, int]:
    """Write the first document and the beginning of a corpus. Returns bytes of text in the whole and in the latter."""
    size, whole, part = corpus.stat().st_size, 0, 0
    with corpus.open("rb") as lines, small.open("wb") as stream:
        read = 0
        for line in lines:
            if not read:
                one.write_bytes(line)
            text = len(json.loads(line)["text"].encode())
            whole, read = whole + text, read + len(line)
            if read <= size // SMALL:
                stream.write(line)
                part += text
    return whole, part


def _installed(name: str) -> bool:
    needed = NEEDS.get(name, name.partition(", ")[2].replace("reference", "") or "json")
    return importlib.util.find_spec(needed) is not None


def _command(name: str, corpus: Path, tokenizer: Path, out: Path) -> list[str]:
    if name in BASELINES:
        return [sys.executable, "-m", "benchmarks.baselines", name, str(corpus), str(tokenizer), str(out)]
    settings = [f"out={out}", f"tokenizer={tokenizer}", "workers=1", f"backend={name.partition(', ')[2]}"]
    source = ["sources.it.kind=jsonl", f"sources.it.path={corpus}"]
    return [sys.executable, "-m", "data_pipeline.cli", "build", *settings, *source]


def _engines(out: Path) -> set[str]:
    """The engines that one of our builds reports. Empty for the output of other programs."""
    path = out / MANIFEST
    return set(read_manifest(out).provenance["engines"]) if path.is_file() else set()


def _run(command: list[str], folder: str) -> tuple[float, float]:
    """Processor seconds and peak MB of a command, including the processes that it starts."""
    log, environment = Path(folder, "log"), {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the libraries have their byte code cached, so ours must be too
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines() or [""]
        raise ConfigError(f"bench: {' '.join(command[2:5])} failed: {last[-1]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
