"""`bench start`: what is made of the readings. That it runs, on real ranks by each way, is a test of the documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import start
from benchmarks.start import OURS, PLAIN, TRAINER, Cost, Shape

WRITES = """
import json, os, sys
job, rank = json.loads(sys.argv[1]), int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "2" and os.environ["OMP_NUM_THREADS"] == "1"
open(sys.argv[2], "w").write(json.dumps(job["readings"][rank]))
sys.exit(job["codes"][rank])
"""


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a run whose ranks write the readings that the job names."""
    (tmp_path / "writes.py").write_text(WRITES)
    monkeypatch.setattr(start, "RANK", [str(tmp_path / "writes.py")])
    return tmp_path


def test_a_cost_is_the_sum_of_both_ranks_and_its_step_the_median_of_those_after_the_first(ranks: Path) -> None:
    job = {"readings": [[5.0, 6.0, 7.5, 8.5], [4.0, 5.0, 9.0, 10.0]], "codes": [0, 0]}
    assert start._cost(job, ranks) == Cost(9.0, 2.0)  # steps of 2, 5.5 and 2


def test_a_rank_that_fails_is_named_with_what_it_printed(ranks: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed"):
        start._cost({"readings": [[1.0, 2.0], [1.0, 2.0]], "codes": [0, 3]}, ranks)


def test_ways_are_compared_by_their_medians() -> None:
    found = {
        TRAINER: [Cost(10.0, 2.0), Cost(90.0, 2.5), Cost(12.0, 9.0)],
        OURS: [Cost(6.0, 2.0)] * 3,
        PLAIN: [Cost(3.0, 2.5)] * 3,
    }
    table = start._table(found, Shape(), 6, 3).splitlines()
    assert "D 256, L 8, V 32000, S = 0, ZeRO-3, 2 gloo ranks of 1 x 512 tokens" in table[0]
    assert [line.split()[-4:] for line in table[2:]] == [
        ["12.00", "1.00", "2.50", "1.00"],
        ["6.00", "0.50", "2.00", "0.80"],
        ["3.00", "0.25", "2.50", "1.00"],
    ]


def test_the_recipe_of_ours_is_a_run_without_pondering_on_shards_that_last(tmp_path: Path) -> None:
    recipe = start._recipe(tmp_path, Shape(64, 1, 100, 16), 3, 1)
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["vocab_size"] == 100
    text = Path(recipe).read_text()
    assert "pondering_steps: 0" in text and "deepspeed: zero1" in text and "sanity_step: true" in text
