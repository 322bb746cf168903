"""The table of stages says what a build does, what each stage needs for it, and what it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest

from data_pipeline.build import pipeline
from data_pipeline.build.journals import Journals
from data_pipeline.build.stages import STAGES, Stage
from data_pipeline.build.state import Build
from data_pipeline.cli import main
from data_pipeline.progress import told
from data_pipeline.read.units import PLAN
from data_pipeline.write.output import WORK, named_by_build
from tests.data_pipeline.builds import arguments, make_texts, write_jsonl

PASSING = ("work/claims/**/*", "work/scratch/**/*", "work/*/*.json")  # of workers, and the journals


def matched(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    return {path.relative_to(folder).as_posix() for name in patterns for path in folder.glob(name) if path.is_file()}


def left_by(folder: Path) -> set[str]:
    return matched(folder, ("**/*",)) - matched(folder, PASSING)


@pytest.fixture(scope="module")
def built(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Stage, Any, Path]]]:
    """(stage, settings, copies of the folder before and after it) of a build in order, and of one that shuffles."""
    place = tmp_path_factory.mktemp("stages")
    corpus = write_jsonl(place / "web.jsonl", [*make_texts(400), *make_texts(100)])
    found: dict[str, list[tuple[Stage, Any, Path]]] = {}
    run_stage = pipeline.run_stage
    for shuffle in ("false", "true"):
        copies = place / shuffle
        stages = found.setdefault(shuffle, [])

        def copied(folder: Path, config: Any, stage: Stage, team: Any, stages: Any = stages, to: Path = copies) -> None:
            shutil.copytree(folder, to / stage.name / "before")
            run_stage(folder, config, stage, team)
            shutil.copytree(folder, to / stage.name / "after")
            stages.append((stage, config, to / stage.name))

        more = ["deduplicate=exact", "keep_dropped=true", "sources.web.max_documents=250", "shard_tokens=900"]
        same = arguments(corpus, tiny_tokenizer, place / "out", *more, "shard_bytes=9000", "workers=1")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "run_stage", copied)
            assert main([*same, f"shuffle={shuffle}", "overwrite=true"]) == 0
    return found


def test_a_build_runs_the_stages_in_the_order_of_the_table(built: Any) -> None:
    order = [stage.name for stage in STAGES]
    for stages in built.values():
        names = [stage.name for stage, *_ in stages]
        assert names == sorted(names, key=order.index)
    assert {stage.name for stages in built.values() for stage, *_ in stages} == set(order)


@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
def test_a_stage_needs_what_the_table_says_and_leaves_what_it_says(built: Any, tmp_path: Path, stage: Stage) -> None:
    """It is done again in a folder with the plan, the journals and what it reads, and with nothing else."""
    assert named_by_build(f"{WORK}/{stage.name}/")
    runs = [(config, copies) for stages in built.values() for one, config, copies in stages if one is stage]
    seen = set()
    for number, (config, copies) in enumerate(runs):
        before, after, alone = copies / "before", copies / "after", tmp_path / str(number)
        known = (f"work/{PLAN}", "tokenizer/*", "work/*/*.json", *stage.reads)
        for name in matched(before, known):
            (alone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(before / name, alone / name)
        for name in ("quarantine", stage.name, "scatter"):
            (alone / WORK / name).mkdir(exist_ok=True)
        given, build = left_by(alone), Build(alone, config)
        assert len(stage.sizes(build)) > 0
        for task in range(len(stage.sizes(build))):
            (scratch := tmp_path / f"{number}-{task}").mkdir()
            journal = told(stage.task(build, task, scratch), lambda *news: None)
            assert journal == Journals(after / WORK / stage.name).of(task)
            Journals(alone / WORK / stage.name).path(task).write_bytes(orjson.dumps(journal))
        made = left_by(alone) - given
        assert made and made <= matched(alone, stage.leaves)
        assert left_by(after) - left_by(before) <= matched(after, stage.leaves)
        assert all((alone / name).read_bytes() == (after / name).read_bytes() for name in made)
        seen |= {pattern for pattern in stage.leaves if matched(alone, (pattern,)) & made}
    assert seen == set(stage.leaves)


def test_every_pattern_that_a_stage_reads_is_left_by_one_before_it() -> None:
    for number, stage in enumerate(STAGES):
        assert set(stage.reads) <= {pattern for earlier in STAGES[:number] for pattern in earlier.leaves}
