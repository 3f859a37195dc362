"""Lines for the user, of the launcher and of the ranks: each begins with its kind.

    note: block_size: 1024, ...          what was decided for the user, or has no effect
    warning: no checkpoint at step 8 ... something went wrong, and the run continues
    error: rank 1 failed first: ...      the last lines of a command that failed
    backend: fsdp (...)                  what a run is made of, by name: data, attention, resume, cache ...

What a command prints as its result (a table, JSON, a log) is not such a line.
"""

from __future__ import annotations

import sys

TO_STDERR = ("error", "warning", "stopped")


def say(kind: str, text: str, *more: str) -> None:
    """Print `kind: text`; `more` are lines that belong to it, indented below.

    Errors, warnings and what stopped a run go to stderr, everything else to stdout.
    """
    stream = sys.stderr if kind.split(" ")[0] in TO_STDERR else sys.stdout
    print(f"{kind}: {text}", *(f"{' ' * 7}{line}" for line in more), sep="\n", file=stream, flush=True)
