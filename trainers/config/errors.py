"""ConfigError, and the exit code of each kind of failure (docs/exit-codes.md)."""

from __future__ import annotations

from trainers.config.redaction import redacted

# A run that a signal stops before it can save ends with 128 + the number of the signal.
RUN_FAILED = 1  # an error in the code
USAGE_ERROR = 2  # a mistake in the config, the flags or the rows
OUT_OF_MEMORY = 3
KILLED = 4  # by the system or by a person
PEER_LOST = 5  # the connection between ranks broke, and no rank of this machine caused it
NOT_FINITE = 6  # NaN or infinite loss or gradient
DATA_FAILED = 7  # an error while rows were read or a batch was collated
DISK_FAILED = 8  # no space left, or an I/O error
HUNG = 9
UNFINISHED = 10  # the model is trained and saved, but its evaluation, merge, card or upload failed
SAVED = 75  # stopped by a signal after a save: start it again (EX_TEMPFAIL of sysexits.h)


class Unfinished(RuntimeError):
    """The model is trained and saved, but a later action failed. Nothing is trained again because of it."""


class ConfigError(ValueError):
    """A mistake that the user can fix. Exit code 2, without a traceback.

    The message says what is wrong, where, and what is allowed. Secrets in it are hidden. `more` is for the
    program.
    """

    def __init__(self, message: str, *more: object) -> None:
        super().__init__(redacted(message), *more)
