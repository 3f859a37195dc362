"""The messages between the launchers of several machines: orders, ends and refusals, as small files."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.supervise.diagnosis import Failure
from trainers.config.errors import OUT_OF_MEMORY, PEER_LOST, ConfigError
from trainers.config.json_text import parse_json
from trainers.rank import no_links
from trainers.storage.run_files import MACHINES


@dataclass(frozen=True)
class Order:
    """What all machines do next: start attempt number `attempt`, or end with the exit code `end`."""

    attempt: int
    port: int
    resume: bool = False  # from the newest checkpoint
    batch_size: int | None = None  # the one that auto_find_batch_size has reached; None: unchanged
    end: int | None = None


@dataclass(frozen=True)
class Ended:
    """How an attempt ended on a machine.

    `stopped` is the signal that ended it (0: none), `saved` what was saved, `lost` whether the machine itself
    is lost.
    """

    machine: int
    folder: str
    time: float  # time.time(), only to order the reports of several machines
    failure: Failure | None = None
    stopped: int = 0
    saved: str = ""
    lost: bool = False

    @property
    def early(self) -> bool:
        """Whether the other machines must end too, because they wait for ranks that have ended."""
        return self.failure is not None or (self.stopped > 0 and not self.saved)


class MachineLost(Exception):
    """Machine 0 sends no heartbeat, so no machine can decide what is next."""


def first_cause(ended: list[Ended]) -> tuple[Ended, Failure]:
    """Return the end of the machine whose failure caused the others, and that failure."""
    failed = [(one, one.failure) for one in ended if one.failure is not None]
    return min(
        failed,
        key=lambda pair: (
            pair[1].code != OUT_OF_MEMORY,
            pair[1].code == PEER_LOST and not pair[0].lost,
            pair[1].waits,
            pair[0].time,
        ),
    )


def refuse(folder: Path, number: int, start_id: str | None, why: str) -> None:
    """Report that this machine does not start, so that the others of this start do not wait for it.

    Without an id that all machines of this start know (under SLURM), write nothing: the others may belong to
    another run in this folder.
    """
    if start_id is not None:
        path = folder / MACHINES / f"refused-{start_id}-{number}.json"
        with contextlib.suppress(OSError):  # the folder itself may be the problem
            write_message(folder, path, {"machine": number, "why": why})


class AnotherRefused(ConfigError):
    """Another machine does not start."""


class StoppedWaiting(Exception):
    """A signal arrived while the machines waited for each other."""


def write_message(run: Path, path: Path, value: dict[str, Any]) -> None:
    no_links.write(run, path, json.dumps(value))


def _text(path: Path) -> str | None:
    """Return the text of a file, or None if it does not exist.

    Another machine may replace the file at any moment. A network file system then reports ESTALE.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def read_message(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    value: dict[str, Any] | None = None if text is None else parse_json(text)
    return value


def read_ended(path: Path) -> Ended | None:
    message = read_message(path)
    if message is None:
        return None
    failure = message.pop("failure")
    return Ended(**message, failure=Failure(**failure) if failure else None)


def read_number(path: Path) -> int:
    text = _text(path)
    return -1 if text is None else int(text or 0)
