"""Finish a build: write one manifest for the output of all tasks, and give the folder its final name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.build.shard import SPLITS
from data_pipeline.build.state import Build
from data_pipeline.config import BuildConfig
from data_pipeline.write.manifest import DROPPED, INPUTS, KEYS, QUARANTINE, compose, totals, write_inputs
from data_pipeline.write.output import join, publish
from ponder_scale.files.delete import delete_file
from ponder_scale.files.write import sync
from ponder_scale.shards.format import TOKENIZER, open_shards
from ponder_scale.shards.manifest import ShardInfo, seal


def finish(folder: Path, out: Path, config: BuildConfig) -> None:
    """Write the manifest from the journals of all tasks, and give the folder its final name."""
    build = Build(folder, config)
    plan, behind = build.plan, build.behind
    counts = totals(build.results(), config)
    for unit in behind:
        of_source = counts[plan.unit(unit).source]
        of_source["bytes_behind_cap"] = of_source.get("bytes_behind_cap", 0) + plan.sizes[unit]
        # a stream's size in bytes is unknown, so count units too
        of_source["units_behind_cap"] = of_source.get("units_behind_cap", 0) + 1
    write_inputs(build.results(), folder / INPUTS)
    joined = {QUARANTINE: "*[0-9].jsonl", **({DROPPED: "*.dropped.jsonl"} if config.keep_dropped else {})}
    for name, parts in joined.items():
        found = sorted((build.work / "quarantine").glob(parts))
        join((part for part in found if int(part.name.partition(".")[0]) not in behind), folder / name)
    splits: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for journal in build.made():
        for split in SPLITS:
            splits[split] += [ShardInfo(**info) for info in journal["shards"][split]]
    if not config.shuffle:
        _delete_behind(build)
    engines = [journal["engine"] for journal in build.results()]
    provenance = {
        **{key: plan.header[key] for key in ("command", "origin")},
        "sources": counts,
        "engines": {name: engines.count(name) for name in sorted(set(engines))},  # units done by each engine
    }
    if plan.header["left_out"]:
        provenance["left_out"] = plan.header["left_out"]  # files that a source names but that were not read
    names = [INPUTS, *joined]
    if config.deduplicate != "none":
        _write_keys(build, folder / KEYS)
        names.append(KEYS)
    files = [*(folder / name for name in names), *sorted((folder / TOKENIZER).iterdir())]
    seal(folder, compose(folder, config, build.tokenizer, splits, files, provenance))
    open_shards(folder)
    publish(folder, out)


def _delete_behind(build: Build) -> None:
    """Delete the shards of units that were read before their source was known to reach its cap in an earlier unit."""
    for unit in build.behind:
        for info in (info for infos in build.read.of(unit)["shards"].values() for info in infos):
            for name in ShardInfo(**info).files:
                delete_file(build.folder / name)


def _write_keys(build: Build, path: Path) -> None:
    """Write the keys of all compared documents, so that later builds which add to this set can compare with them."""
    with path.open("wb") as stream:
        for bucket in range(build.key_buckets):
            keys = np.load(build.work / "duplicates" / f"{bucket:06d}.new.npy", mmap_mode="r")
            stream.write(keys.astype("<u8").tobytes())
        sync(stream)
