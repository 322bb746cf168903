"""What grows with ranks and shard files is counted on real ranks, and by the law that is stated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.scale import law, measure
from ponder_scale.errors import ConfigError
from tests.ranks import PLAIN, REPOSITORY

# in a process of its own: what counts stays in the interpreter
COUNT = """
import json
from benchmarks.scale import count
print(json.dumps([count(2, files, 1, ["start"]) for files in (2, 6)]))
"""


@pytest.mark.parametrize("points", [[7, 7, 7], [3, 5, 9], [4, 16, 64]])
def test_a_law_goes_through_what_was_counted(points: list[float]) -> None:
    grown = law(dict(zip((2, 4, 8), points, strict=True)))
    expected: dict[float, Any] = {7: lambda n: 7, 3: lambda n: n + 1, 4: lambda n: n * n}
    assert grown(4096) == pytest.approx(expected[points[0]](4096))


def test_a_look_by_the_clock_makes_no_other_law() -> None:
    assert law({16: 25, 32: 40, 64: 73})(4096) == pytest.approx(4104, rel=0.02)
    assert law({16: 3.7, 32: 13, 64: 50})(4096) > 100_000  # what every rank sends to every other one


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least three numbers of ranks and two of shard files"):
        measure([2, 4], [1, 10])


def test_each_shard_is_looked_at_by_one_rank_and_each_part_is_written_once() -> None:
    environment = {**os.environ, **PLAIN}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    few, many = json.loads(done.stdout.splitlines()[-1])
    # over both ranks: an open and two stats for each shard more, wherever the run begins
    assert many["start"]["opens"] - few["start"]["opens"] == 4
    assert many["start"]["stats"] - few["start"]["stats"] == 8
    assert few["save"]["written"] == many["save"]["written"] == 2 + 4  # parts; latest, index, state, tokenizer
    assert few["step"]["stats"] == 0 and few["step"]["names"] == 0 and few["step"]["written"] == 0
    assert few["save"]["collectives"] > 0 and few["save"]["MB sent"] > 0 and few["start"]["sockets"] > 0
