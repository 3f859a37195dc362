"""Stubs of SLURM's commands."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from launcher.slurm.job import SlurmError

Submitted = Callable[[], list[list[str]]]  # the type of the fixture submitted


def write_sbatch(folder: Path) -> Submitted:
    """Write a stub of sbatch to the folder. Return a function that returns the arguments of each call."""
    folder.mkdir()
    script, log = folder / "sbatch", folder / "calls"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "print('4711;main')\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


class Controller:
    """A stub of scontrol, scancel and squeue, which knows these jobs and records the other commands."""

    def __init__(self, **states: str) -> None:
        self.states = {name.removeprefix("job"): state for name, state in states.items()}
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, *argv: str) -> str:
        if argv[:2] == ("scontrol", "show"):
            if (state := self.states.get(argv[-1])) is None:
                raise SlurmError("scontrol: Invalid job id specified")
            return f"JobId={argv[-1]} JobState={state} Reason=None"
        if argv[0] == "squeue":
            return f"{argv[4]}.0" if self.states[argv[4]] == "RUNNING" else ""
        self.asked.append(argv)
        return ""
