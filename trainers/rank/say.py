"""Print lines for the user, from the launcher and the ranks. Each line begins with its kind:

    note: block_size: 1024, ...          a value that was derived, or a key that has no effect
    warning: no checkpoint at step 8 ... something went wrong, and the run continues
    error: rank 1 failed first: ...      the last lines of a command that failed
    backend: fsdp (...)                  a property of the run, by name: data, attention, resume, cache ...

The result of a command (a table, JSON, a log) is not such a line.
"""

from __future__ import annotations

import sys

from trainers.config.redaction import redacted

TO_STDERR = ("error", "warning", "stopped")


def say(kind: str, text: str, *more: str) -> None:
    """Print `kind: text`, with the lines of `more` indented below it.

    Errors, warnings and "stopped by ..." go to stderr, all other kinds to stdout. Secrets are hidden: the
    message of a library may have a proxy's password.
    """
    stream = sys.stderr if kind.split(" ")[0] in TO_STDERR else sys.stdout
    lines = (f"{kind}: {text}", *(f"{' ' * 7}{line}" for line in more))
    print(redacted("\n".join(lines)), file=stream, flush=True)
