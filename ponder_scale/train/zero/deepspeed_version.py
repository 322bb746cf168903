"""Check whether a version of DeepSpeed trains models right whose passes share weights."""

from __future__ import annotations

import re
from typing import NamedTuple

from ponder_scale.errors import ConfigError

TESTED = ("0.19.8",)  # the tests of this repository ran with these; requirements.lock installs them


class Wrong(NamedTuple):
    """Versions `first` to `last` silently train a stage wrongly."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    stage: int
    precisions: tuple[str, ...]
    how: str


WRONG = (
    Wrong((0,), (0, 18, 2), 2, ("fp32", "bf16"), "loses gradients of weights that several passes share"),
    Wrong((0, 18, 3), (0, 19, 3), 2, ("bf16",), "gets gradients of modules used more than once wrong (its issue 8224)"),
    Wrong((0,), (0, 18, 5), 0, ("bf16",), "scales gradients and does not clear them (its issue 7837)"),
)


def refuse_wrong_version(version: str, stage: int, precision: str) -> None:
    """Raise ConfigError if this version of DeepSpeed is known to train the stage wrongly in the precision."""
    for wrong in WRONG:
        if wrong.first <= _release(version) <= wrong.last and stage == wrong.stage and precision in wrong.precisions:
            raise ConfigError(
                f"deepspeed is {version}, which silently {wrong.how} under stage {stage} in {precision}; install "
                f"deepspeed=={TESTED[-1]}"
            )


def is_tested(version: str) -> bool:
    """Whether the tests ran with this version. A local build (+...) counts as the version that it names."""
    return version.split("+")[0] in TESTED


def _release(version: str) -> tuple[int, ...]:
    # A pre-release counts as the release that it precedes.
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])
