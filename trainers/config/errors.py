"""The user's mistakes, and the exit codes of every kind of failure (docs/exit-codes.md)."""

from __future__ import annotations

# A run that was stopped before it could save ends with 128 + the signal.
RUN_FAILED = 1  # an error in the code
USAGE_ERROR = 2  # a mistake in the config, the flags or the rows
OUT_OF_MEMORY = 3
KILLED = 4  # by the system, or by hand
PEER_LOST = 5  # the connection between ranks broke, and no rank of this machine is to blame
NOT_FINITE = 6  # NaN or infinite loss or gradient
DATA_FAILED = 7  # an error while rows were read or collated
DISK_FAILED = 8  # no space, or an error of input or output
HUNG = 9
SAVED = 75  # stopped by a signal, and saved: run me again (sysexits' EX_TEMPFAIL)


class ConfigError(ValueError):
    """A mistake that the user can mend: what is wrong, where, what is allowed. Exit code 2, no traceback."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
