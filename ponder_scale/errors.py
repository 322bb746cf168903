"""The exceptions whose message is for the user: the command line prints it as one line and exits with 2.

Beside them, the other exit codes of `ponder-scale train`, which launchers and the Slurm templates act upon.
"""

USER_ERROR = 2
AGAIN = 85  # saved in time for a signal or the time limit: start me again
HUNG = 86  # no progress; the stacks are in the log. Start again only if there was progress before
UNHEALTHY = 87  # non-finite losses, diverged replicas: a person must look
REWOUND = 84  # within the program only: the same command starts over at once, without the data of a spike
INTERRUPTED = 130  # saved for Ctrl-C


class UserError(Exception):
    """Something the user can correct. The message names the file or key, the value, what was expected, the remedy."""

    exit_code = USER_ERROR


class ConfigError(UserError):
    """A recipe, an override or a DeepSpeed file is wrong."""


class ShardError(UserError):
    """Token shards are missing, damaged, unfinished or of another kind than expected."""


class TokenizerError(UserError):
    """A tokenizer cannot be read, or is not the one the shards were made with."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another model."""


class UnhealthyError(UserError):
    """The run itself is ill: starting it again would not help."""

    exit_code = UNHEALTHY


class SaveError(UserError):
    """A checkpoint could not be saved: the disk is full, read-only or gone. What was saved before is untouched.

    Attributes:
        remedy: what to do about it, by its cause.
    """

    exit_code = UNHEALTHY

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class SignalledError(BaseException):
    """A signal came while a run waited for something that is not its own; nothing was begun.

    For the user as a `UserError`. No `Exception`, as libraries that call what waits wrap those in their own.
    """

    def __init__(self, message: str, *, interrupted: bool) -> None:
        super().__init__(message)
        self.exit_code = INTERRUPTED if interrupted else AGAIN


class FencedError(UserError):
    """Another process has taken the run over; this one must not write any more."""
