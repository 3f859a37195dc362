"""The protocol between the launcher and the ranks: the files of an attempt, environment variables, and notes.

    <project_name>/launch/attempt-K/               one launch of the ranks; several machines: machine-M/ in it
        accelerate.yaml deepspeed.json config.json command.txt    what the launcher generated
        launcher.log                               the output of `accelerate launch`
        rank-N.log  rank-N.pid  rank-N.stack       output, process id, Python stack (empty until requested)
        rank-N.done | .error.json | .stopped.json  how the rank ended; none if it was killed
        prepared                                   several machines: machine 0 has prepared the data

Heartbeats are in another folder, on a disk of the machine (heartbeat.py). If the disk of the run is full, a
rank writes rank-N.error.json or rank-N.stopped.json there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from trainers.config.errors import ConfigError
from trainers.config.json_text import parse_json
from trainers.rank import no_links

# Set by the launcher for its ranks.
LOG_DIR = "PHALANX_LOG_DIR"  # the attempt's folder on this machine; not set without the launcher
LIVE = "PHALANX_LIVE"  # 1: a person watches the terminal
HEARTBEATS = "PHALANX_HEARTBEATS"  # the folder of the heartbeats
JOB_END = "PHALANX_JOB_END"  # time limit of the job, as time.time(), if it is known
WAITS = "PHALANX_WAITS_FOR_MACHINE_0"  # several machines: 1 if machine 0 prepares the data for this one too
# Set by the user.
CACHE = "PHALANX_CACHE"  # where prepared data is kept
WARM = "PHALANX_WARM"  # the socket of a warm process (trainers/warm.py)

LAUNCH = "launch"  # in the run's folder
_ATTEMPT, _MACHINE, _RANK = "attempt-", "machine-", "rank-"


class RankFiles:
    """The files of one rank in an attempt."""

    def __init__(self, folder: Path, rank: int) -> None:
        stem = folder / f"{_RANK}{rank}"
        self.log = stem.with_suffix(".log")
        self.pid = stem.with_suffix(".pid")
        self.stack = stem.with_suffix(".stack")
        self.done = stem.with_suffix(".done")
        self.error = stem.with_suffix(f".{ErrorNote.SUFFIX}")
        self.stopped = stem.with_suffix(f".{StopNote.SUFFIX}")

    @property
    def ended_by_itself(self) -> bool:
        """Whether the rank reported how it ended. A rank that was killed did not."""
        return any(path.exists() for path in (self.done, self.error, self.stopped))


class AttemptFiles:
    """The files of one attempt on one machine.

    `heartbeats` is the folder of the heartbeats, where a rank leaves its note if it cannot write it here.
    """

    def __init__(self, folder: Path, heartbeats: Path | None = None) -> None:
        self.folder, self.heartbeats = folder, heartbeats
        self.accelerate_config = folder / "accelerate.yaml"
        self.deepspeed_config = folder / "deepspeed.json"
        self.config = folder / "config.json"  # the effective config, which the ranks read
        self.command = folder / "command.txt"
        self.launcher_log = folder / "launcher.log"

    def rank(self, number: int) -> RankFiles:
        """Return the files of a rank."""
        return RankFiles(self.folder, number)

    def notes(self, kind: type[Note]) -> list[Note]:
        """Return the notes of a kind that the ranks have left. Skips a note that is incomplete."""
        folders = [self.folder] if self.heartbeats is None else [self.folder, self.heartbeats]
        return [note for folder in folders for note in read_notes(folder, kind)]

    def pids(self) -> dict[int, int]:
        """Return the process ids that the ranks have written so far: rank -> pid."""
        written = {path: path.read_text(encoding="utf-8") for path in self.folder.glob(f"{_RANK}*.pid")}
        return {int(path.stem.removeprefix(_RANK)): int(text) for path, text in written.items() if text}


def attempt_folder(run: Path, number: int) -> Path:
    """Return `launch/attempt-K` of a run."""
    return run / LAUNCH / f"{_ATTEMPT}{number}"


def run_of(folder: Path) -> Path:
    """Return the run that the folder of an attempt, or of a machine in one, belongs to."""
    above = (path.parent.parent for path in (folder, *folder.parents) if path.name.startswith(_ATTEMPT))
    return next(above, folder)


def machine_folder(attempt: Path, machine: int) -> Path:
    """Return the folder of one machine in an attempt on several machines."""
    return attempt / f"{_MACHINE}{machine}"


def attempts(run: Path) -> dict[int, Path]:
    """Return the attempts of a run: number -> folder."""
    found = {path.name.removeprefix(_ATTEMPT): path for path in (run / LAUNCH).glob(f"{_ATTEMPT}*")}
    return {int(number): path for number, path in found.items() if number.isdigit() and path.is_dir()}


def began(attempt: Path, machine: int | None = None) -> bool:
    """Return whether an attempt was set up, on this machine or (None) on any machine."""
    pattern = f"{_MACHINE}{'*' if machine is None else machine}/{AttemptFiles(Path()).command}"
    return AttemptFiles(attempt).command.exists() or any(True for _ in attempt.glob(pattern))


def rank_logs(attempt: Path, rank: int) -> Iterator[Path]:
    """Yield the logs of a rank in an attempt: one, in the folder of the machine that had the rank."""
    for folder in (attempt, *attempt.glob(f"{_MACHINE}*")):
        if (log := RankFiles(folder, rank).log).exists():
            yield log


def logged_ranks(attempt: Path) -> set[int]:
    """Return the ranks that have a log in an attempt."""
    logs = (path.stem.removeprefix(_RANK) for path in attempt.glob(f"**/{_RANK}*.log"))
    return {int(number) for number in logs if number.isdigit()}


def prepared_mark(attempt: Path) -> Path:
    """Return the file that exists once machine 0 has prepared the data of an attempt."""
    return attempt / "prepared"


@dataclass(frozen=True)
class ErrorNote:
    """A note on the error that stopped a rank.

    accelerate and torchrun turn every exit code into 1, so the note has the rank's code.
    """

    SUFFIX: ClassVar[str] = "error.json"
    rank: int
    time: float  # time.monotonic(): orders the ranks of one machine, even if the clock is set back
    code: int  # the exit code of the error (docs/exit-codes.md)
    type: str  # name of the error's class
    message: str
    peer_lost: bool  # the error only means that another rank is gone
    logged: int = 0  # bytes of the rank's log before the traceback


@dataclass(frozen=True)
class StopNote:
    """A note of a rank that a signal stopped.

    The rank ends with 0, because torchrun treats every other exit code as a failure.
    """

    SUFFIX: ClassVar[str] = "stopped.json"
    rank: int
    signal: int
    saved: str  # what was saved; empty if nothing was


Note = TypeVar("Note", ErrorNote, StopNote)


def write_note(folder: Path, note: ErrorNote | StopNote) -> None:
    """Write a note into the attempt's folder.

    If this is impossible because its disk is full, or the folder was moved, write it to that of the
    heartbeats, which is the machine's own.

    Raises:
        OSError, ConfigError: both are impossible.
    """
    try:
        _write_note(folder, note)
    except (OSError, ConfigError):
        if (heartbeats := os.environ.get(HEARTBEATS)) is None:
            raise
        _write_note(Path(heartbeats), note)


def _write_note(folder: Path, note: ErrorNote | StopNote) -> None:
    files = RankFiles(folder, note.rank)
    path = files.error if isinstance(note, ErrorNote) else files.stopped
    no_links.write(run_of(folder), path, json.dumps(asdict(note)))


def read_notes(folder: Path, kind: type[Note]) -> list[Note]:
    """Return the notes of a kind in an attempt's folder. Skips a note that is incomplete."""
    found = []
    for path in sorted(folder.glob(f"{_RANK}*.{kind.SUFFIX}")):
        with contextlib.suppress(ValueError):
            found.append(kind(**parse_json(path.read_text(encoding="utf-8"))))
    return found
