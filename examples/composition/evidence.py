"""Does pondering pay? The models learn facts and are asked compositions that they never saw: python evidence.py RUN

It draws a world for each seed, makes shards of it, trains the pondering model and every baseline on it with
`ponder-scale compare`, asks them, and leaves compare.html and compare-answers.svg in RUN. Then it measures the
mechanism of each pondering model. It skips finished work, so you can stop it and start the same command again.

`--tune` tries every learning rate and weight decay for every model, on seeds that the result is not reported on. It
prints the share of questions that each answers right, and `BEST` has the best settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SEEDS = (11, 12, 13, 14, 15)  # seeds of the world and of the model
TUNING_SEEDS = (1, 2)
RATES, DECAYS = ("3e-3", "1e-2", "2e-2"), ("0.1", "0.5")
GOAL = "all"  # of the questions: what the settings of a model are chosen by
FIRST = ("pondering-1", "vanilla", "vanilla-twice", "vanilla-flops", "looped", "hidden")
LATER = ("vanilla-time", "vanilla-long")  # their time is known only after the others have trained
LONG = 1  # worlds on which vanilla-long trains, since it takes as long as all other models together
EXTRAS = ("looped", "hidden", *LATER)  # those that compare trains when it is asked to
# Rate and decay by model, as `--tune` found them. The longer trainings of vanilla have its settings.
BEST = {
    "pondering-1": ("3e-3", "0.1"),
    "vanilla": ("1e-2", "0.1"),
    "vanilla-twice": ("2e-2", "0.1"),
    "vanilla-flops": ("1e-2", "0.1"),
    "looped": ("3e-3", "0.5"),
    "hidden": ("1e-2", "0.5"),
    "vanilla-time": ("1e-2", "0.1"),
    "vanilla-long": ("1e-2", "0.1"),
}
STEPS = [str(steps) for steps in range(7)]


def run(*command: str | Path) -> None:
    """Run a command, and keep its output in case it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}")


def make_data(folder: Path, seed: int) -> None:
    """Draw a world, and build packed shards of its facts and compositions."""
    if (folder / "compositions/packing-64").is_dir():
        return
    run(sys.executable, HERE / "facts.py", folder, "--seed", str(seed))
    for source in ("facts", "compositions"):
        texts = [f"sources.{source}.kind=jsonl", f"sources.{source}.path={folder / source}.jsonl"]
        places = [f"tokenizer={folder / 'tokenizer'}", f"out={folder / source}", "overwrite=true"]
        run("ponder-data", "build", *texts, *places, "heldout_fraction=0")
        run("ponder-data", "pack", folder / source, "--seq-len", "64")


def comparison(out: Path, seeds: Sequence[int], *more: str, best: Mapping[str, tuple[str, str]] = BEST) -> list[str]:
    """The command that compares all models on the worlds of these seeds, each with its own rate and decay."""
    data = out / "data/{seed}"
    own = [
        word
        for model, (rate, decay) in best.items()
        for word in ("--for", model, f"optim.lr={rate}", f"optim.weight_decay={decay}")
    ]
    sources = [f"data.sources.{name}.path={data / name}" for name in ("facts", "compositions")]
    asking = ["--answers", str(data / "items.jsonl"), "--answer-steps", *STEPS]
    # flags that take several values would swallow a setting that comes after them
    shared = [str(HERE / "recipe.yaml"), *sources, *more, "--seeds", *map(str, seeds), "--nproc", "1"]
    return ["ponder-scale", "compare", *shared, "--with", *EXTRAS, *own, *asking]


def together(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Run the commands, at most this many at the same time."""
    with ThreadPoolExecutor(jobs) as pool:
        began = time.monotonic()
        for number, _ in enumerate(pool.map(lambda command: run(*command), commands), 1):
            print(f"{number} of {len(commands)} trained, {time.monotonic() - began:.0f} s", flush=True)


def evidence(out: Path, seeds: Sequence[int], jobs: int) -> None:
    """Train and ask all models on all seeds."""
    for models in (FIRST, LATER):
        runs = [
            f"{model}/seed-{seed}" for model in models for seed in (seeds[:LONG] if model == "vanilla-long" else seeds)
        ]
        together([comparison(out, seeds, f"run_dir={out}", "--only", name) for name in runs], jobs)
    report = comparison(out, seeds, f"run_dir={out}", "--report")
    print(subprocess.run(report, stdout=subprocess.PIPE, text=True, check=True).stdout)
    mechanism(out, seeds)


def mechanism(out: Path, seeds: Sequence[int]) -> None:
    """Print what mechanism.py measures of the pondering model, a mean over the seeds for each group."""
    found = []
    for seed in seeds:
        place = out / FIRST[0] / f"seed-{seed}"
        folder, figures = place / "huggingface", place / "mechanism.json"
        if not folder.is_dir():
            run("ponder-scale", "export", place, folder)
        if not figures.is_file():
            run(sys.executable, HERE / "mechanism.py", folder, out / "data" / str(seed), "--json", figures)
        found.append(json.loads(figures.read_text(encoding="utf-8")))
    columns = list(next(iter(found[0].values())))
    print(f"| group | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for group in found[0]:
        means = (statistics.fmean(each[group][column] for each in found) for column in columns)
        print(f"| {group} | {' | '.join(f'{mean:.3f}' for mean in means)} |")


def tune(out: Path, jobs: int) -> None:
    """For each model, print the mean share of the goal with each setting, and the best setting.

    Every setting is tried on the first seed. The two that are best there are tried on the other seeds too.
    """
    places = {(rate, decay): out / f"tune/lr{rate}-wd{decay}" for rate, decay in itertools.product(RATES, DECAYS)}

    def shares(model: str, seeds: Sequence[int]) -> dict[tuple[str, str], float]:
        found = {}
        for setting, place in places.items():
            files = [place / model / f"seed-{seed}/answers.json" for seed in seeds]
            if all(file.is_file() for file in files):
                goals = [json.loads(file.read_text())["groups"][GOAL]["share"] for file in files]
                found[setting] = statistics.fmean(max(goal.values()) for goal in goals)
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def tried(model: str, setting: tuple[str, str], seed: int) -> list[str]:
        settings = [f"run_dir={places[setting]}", f"optim.lr={setting[0]}", f"optim.weight_decay={setting[1]}"]
        return comparison(out, TUNING_SEEDS, *settings, "--only", f"{model}/seed-{seed}", best={})

    first, *others = TUNING_SEEDS
    together([tried(model, setting, first) for model in FIRST for setting in places], jobs)
    best = [(model, setting) for model in FIRST for setting in list(shares(model, [first]))[:2]]
    together([tried(model, setting, seed) for model, setting in best for seed in others], jobs)
    for model in FIRST:
        for name, seeds in (("first seed", [first]), ("all seeds", TUNING_SEEDS)):
            print(f"{model}, {name}: " + ", ".join(f"{key} {share:.3f}" for key, share in shares(model, seeds).items()))


def main() -> None:
    """Run the experiment, or search for its settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder for everything made here")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the world and of the model")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time, one core each")
    parser.add_argument("--tune", action="store_true", help="find each model's learning rate and weight decay instead")
    options = parser.parse_args()
    began = time.monotonic()
    for seed in TUNING_SEEDS if options.tune else options.seeds:
        make_data(options.run / "data" / str(seed), seed)
    if options.tune:
        tune(options.run, options.jobs)
    else:
        evidence(options.run, options.seeds, options.jobs)
    print(f"== made in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
