"""The command `ponder-scale`. Heavy imports wait until the arguments are known to be right."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Sequence

from ponder_scale.config import RunConfig
from ponder_scale.errors import INTERRUPTED, SignalledError, UserError
from ponder_scale.settings.commandline import Parser, outlive_readers, parse
from ponder_scale.train.survive import signals
from ponder_scale.version import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. A user's error is one line on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["train"]:
        signals.install()
        gc.disable()  # until the loop begins: a tenth of the time that loading libraries takes
    outlive_readers()
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.WARNING
    _log_to_stdout(level, Timed() if arguments[:1] in (["train"], ["compare"]) else logging.Formatter())
    try:
        options = parse(_parser(), arguments, RunConfig, "overrides")
        code = options.run(options, arguments) or 0
    except (UserError, SignalledError) as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch.distributed" in sys.modules:
        # Ending the interpreter under a live process group sometimes aborts ("terminate called without an active
        # exception"); all files are closed and synced by now.
        os._exit(code)
    sys.exit(code)


class Timed(logging.Formatter):
    """The time of day before each line, and each day its date on a line before the first."""

    _date = ""

    def format(self, record: logging.LogRecord) -> str:
        """As logging asks for it."""
        date, clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)).split()
        new = "" if date == self._date else f"== {date}\n"
        self._date = date
        return f"{new}{clock} {super().format(record)}"


def _log_to_stdout(level: int, formatter: logging.Formatter) -> None:
    # our own loggers only: the root logger would also show the compiler calls that DeepSpeed probes the machine with
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    ours = logging.getLogger("ponder_scale")
    ours.setLevel(level)
    ours.addHandler(handler)
    ours.propagate = False


def _parser() -> Parser:
    # slow, so after the signal handlers
    from ponder_scale.commands import cluster, compare, evaluation, folders, runs, training
    from ponder_scale.commands.examples import add_examples

    parser = Parser(
        prog="ponder-scale",
        description="Pretrain pondering language models, from token shards to a Hugging Face folder.",
    )
    parser.add_argument("--version", action="version", version=f"ponder-scale {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (training, cluster, compare, runs, folders, evaluation):
        group.add_commands(commands)
    add_examples(parser)
    return parser


if __name__ == "__main__":
    main()
