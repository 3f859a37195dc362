"""What the launchers of several machines tell each other: small files in the run's folder, which they share.

    launch/machines/member-M.json           machine M is there, with a word drawn at its start
    launch/machines/start.json              machine 0: the words of all, and the first order
    launch/machines/alive-M                 a number that grows while the launcher of machine M lives
    launch/attempt-K/machine-M/ended.json   how the attempt ended there
    launch/attempt-K/order.json             machine 0, when it has ended everywhere: what all do next

Machine 0 alone decides. A run of one machine writes none of this.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.diagnosis import Failure
from launcher.topology import Topology
from trainers.config import OUT_OF_MEMORY, PEER_LOST, ConfigError
from trainers.run_folder import LAUNCH, write_whole

JOIN_SECONDS = 600.0  # for all machines to come: environments are set up, file systems are slow
GONE_SECONDS = 60.0  # without a sign of life; a network file system may show a file as late as that
LOOK_SECONDS = 0.5  # between two looks at the others' files


@dataclass(frozen=True)
class Order:
    """What all machines do next: attempt number `attempt`, or end with the code `end`."""

    attempt: int
    port: int
    resume: bool = False  # from the newest checkpoint
    end: int | None = None


@dataclass(frozen=True)
class Ended:
    """How an attempt ended on a machine; `stopped` is the signal that ended it, `saved` what was saved."""

    machine: int
    code: int
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


class Machines:
    """This machine among those of the run."""

    def __init__(self, folder: Path, topology: Topology, given_up: Callable[[], bool]) -> None:
        self.launch, self.given_up = folder / LAUNCH, given_up
        self.rank, self.count = topology.machine_rank, topology.num_machines
        self.others = [number for number in range(self.count) if number != self.rank]
        self.word = secrets.token_hex(8)
        self.number = 0  # of the attempt
        self.counter = 0
        self.heard: dict[int, tuple[int, float]] = {}  # machine -> its number, and when it last grew
        self.looked = 0.0

    # ------------------------------------------------------------------------------------- the start

    def join(self, order: Callable[[], Order]) -> Order:
        """Waits until all machines are there; returns machine 0's first order.

        Raises:
            ConfigError: some do not come. Most often they do not see the same folder.
        """
        if self.count == 1:
            return order()
        first = self._gather(order) if self.rank == 0 else self._present()
        return self._go(first)

    def _gather(self, order: Callable[[], Order]) -> Order:
        self._folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("start.json", "member-*", "alive-*"):
            for left in self._folder.glob(pattern):  # of an earlier start; who is there already writes again
                left.unlink(missing_ok=True)
        for _ in self._patiently():
            words = {
                str(number): told["word"]
                for number in self.others
                if (told := _read(self._folder / f"member-{number}.json"))
            }
            if len(words) == len(self.others):
                break
        first = order()
        _write(self._folder / "start.json", {"words": words, "order": asdict(first)})
        return first

    def _present(self) -> Order:
        card = self._folder / f"member-{self.rank}.json"
        for _ in self._patiently():
            start = _read(self._folder / "start.json")
            if start and start["words"].get(str(self.rank)) == self.word:
                return Order(**start["order"])
            # Machine 0 empties the folder when it begins.
            if (_read(card) or {}).get("word") != self.word:
                _write(card, {"word": self.word, "host": socket.gethostname(), "pid": os.getpid()})
        raise AssertionError("not reached")

    def _patiently(self) -> Iterator[None]:
        """Turns until the caller leaves the loop, for JOIN_SECONDS at most."""
        end = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < end and not self.given_up():
            yield
            time.sleep(LOOK_SECONDS)
        if self.given_up():
            raise StoppedWaiting
        there = {number for number in self.others if (self._folder / f"member-{number}.json").exists()}
        missing = [0] if self.rank else sorted(set(self.others) - there)
        raise ConfigError(
            f"launch.num_machines: no sign of machine {', '.join(map(str, missing))} within "
            f"{JOIN_SECONDS:.0f} s. All {self.count} machines run the same command, each with its own "
            f"machine_rank, and must see the same {self.launch.parent} (on a shared file system)."
        )

    # ------------------------------------------------------------------------------------- an attempt

    def elsewhere(self) -> Ended | None:
        """How the attempt ended on another machine, where this one must end too; also a sign of life."""
        if self.count == 1 or time.monotonic() - self.looked < LOOK_SECONDS:
            return None
        self._sign()
        for number in self.others:
            ended = self._ended(number) or self._gone(number)
            if ended is not None and ended.early:
                return ended
        return None

    def settle(self, own: Ended, decide: Callable[[list[Ended]], Order]) -> Order:
        """When the attempt has ended everywhere, machine 0 decides what comes next, and all do it.

        Raises:
            GoneMachine: machine 0 is no more.
        """
        if self.count == 1:
            return decide([own])
        _write(self._attempt / f"machine-{self.rank}" / "ended.json", asdict(own))
        if self.rank:
            return self._go(self._obey())
        order = decide([own, *(self._await(number) for number in self.others)])
        _write(self._attempt / "order.json", asdict(order))
        return self._go(order)

    def _obey(self) -> Order:
        while True:
            if told := _read(self._attempt / "order.json"):
                return Order(**told)
            self._sign()
            if self._gone(0):
                raise GoneMachine
            time.sleep(LOOK_SECONDS)

    def _await(self, number: int) -> Ended:
        while True:
            self._sign()
            if ended := self._ended(number) or self._gone(number):
                return ended
            time.sleep(LOOK_SECONDS)

    def _ended(self, number: int) -> Ended | None:
        told = _read(self._attempt / f"machine-{number}" / "ended.json")
        if told is None:
            return None
        failure = told.pop("failure")
        return Ended(**told, failure=Failure(**failure) if failure else None)

    def _sign(self) -> None:
        """A sign of life."""
        self.looked = time.monotonic()
        self.counter += 1
        (self._folder / f"alive-{self.rank}").write_text(str(self.counter), encoding="utf-8")

    def _gone(self, number: int) -> Ended | None:
        now, told = time.monotonic(), _number(self._folder / f"alive-{number}")
        before, since = self.heard[number]
        if told != before:
            self.heard[number] = told, now
            return None
        if now - since < GONE_SECONDS:
            return None
        host = (_read(self._folder / f"member-{number}.json") or {}).get("host", "the first")
        reason = f"machine {number} ({host}) gave no sign of life for {now - since:.0f} s"
        folder = str(self._attempt / f"machine-{number}")
        return Ended(number, PEER_LOST, folder, time.time(), Failure(None, reason, PEER_LOST), gone=True)

    # ------------------------------------------------------------------------------------- folders

    def _go(self, order: Order) -> Order:
        self.number = order.attempt
        self.heard = {number: (-1, time.monotonic()) for number in self.others}
        return order

    @property
    def _folder(self) -> Path:
        return self.launch / "machines"

    @property
    def _attempt(self) -> Path:
        return self.launch / f"attempt-{self.number}"


class StoppedWaiting(Exception):
    """A signal came while the machines waited for each other."""


def _write(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return value


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8") or 0)
    except FileNotFoundError:
        return -1
