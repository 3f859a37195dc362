"""What the launchers of several machines write for each other: orders, ends and refusals, as small files."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.supervise.diagnosis import Failure
from trainers.config.errors import OUT_OF_MEMORY, PEER_LOST, ConfigError
from trainers.rank.protocol import LAUNCH
from trainers.storage.run_folder import write_whole


@dataclass(frozen=True)
class Order:
    """What all machines do next: attempt number `attempt`, or end with the code `end`."""

    attempt: int
    port: int
    resume: bool = False  # from the newest checkpoint
    batch_size: int | None = None  # None: as it was; else what auto_find_batch_size has come to
    end: int | None = None


@dataclass(frozen=True)
class Ended:
    """How an attempt ended on a machine; `stopped` is the signal that ended it, `saved` what was saved."""

    machine: int
    folder: str
    time: float  # time.time(): only to order what several machines say
    failure: Failure | None = None
    stopped: int = 0
    saved: str = ""
    gone: bool = False

    @property
    def early(self) -> bool:
        """Whether the other machines must end too: they wait for ranks that are no more."""
        return self.failure is not None or (self.stopped > 0 and not self.saved)


class GoneMachine(Exception):
    """Machine 0 gives no sign of life, so nobody decides."""


def first_cause(ended: list[Ended]) -> tuple[Ended, Failure]:
    """The machine whose failure is the cause of the others', and the failure."""
    failed = [(one, one.failure) for one in ended if one.failure is not None]
    return min(
        failed,
        key=lambda pair: (
            pair[1].code != OUT_OF_MEMORY,
            pair[1].code == PEER_LOST and not pair[0].gone,
            pair[1].waits,
            pair[0].time,
        ),
    )


def refuse(folder: Path, number: int, start_id: str | None, why: str) -> None:
    """This machine does not begin: the others of this start need not wait for it.

    Without an id that they all know, a job's, nothing is said: they might be of another run in this folder.
    """
    if start_id is not None:
        path = folder / LAUNCH / "machines" / f"refused-{start_id}-{number}.json"
        with contextlib.suppress(OSError):  # the folder may be what is wrong
            write_message(path, {"machine": number, "why": why})


class AnotherRefused(ConfigError):
    """Another machine does not begin."""


class StoppedWaiting(Exception):
    """A signal came while the machines waited for each other."""


def write_message(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value))


def _text(path: Path) -> str | None:
    """A file that another machine may write at any moment; a network file system then says ESTALE."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def read_message(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    value: dict[str, Any] | None = None if text is None else json.loads(text)
    return value


def read_ended(path: Path) -> Ended | None:
    told = read_message(path)
    if told is None:
        return None
    failure = told.pop("failure")
    return Ended(**told, failure=Failure(**failure) if failure else None)


def read_number(path: Path) -> int:
    text = _text(path)
    return -1 if text is None else int(text or 0)
