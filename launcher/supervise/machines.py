"""What the launchers of several machines tell each other: small files in the run's folder, which they share.

    launch/machines/member-M.json           machine M is there, with a word drawn at its start
    launch/machines/start.json              machine 0: the words of all, and the first order
    launch/machines/refused-ID-M.json       machine M of the start with this id: why it does not begin
    launch/machines/alive-M                 a number that grows while the launcher of machine M lives
    launch/attempt-K/machine-M/ended.json   how the attempt ended there
    launch/attempt-K/cut.json               machine 0: the end of one of them that all must follow
    launch/attempt-K/order.json             machine 0, when it has ended everywhere: what all do next
    launch/attempt-K/prepared               machine 0's rank 0: the data is there (storage/data_cache.py)

Machine 0 alone decides, and the others look at its files alone. A run of one machine writes none of this.
Before it begins, machine 0 leaves its word in the cache of prepared data: who finds it shares that cache.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.plan.topology import Topology
from launcher.supervise.diagnosis import Failure
from launcher.supervise.hangs import Wakefulness
from launcher.supervise.machine_messages import (
    AnotherRefused,
    Ended,
    GoneMachine,
    Order,
    StoppedWaiting,
    read_ended,
    read_message,
    read_number,
    write_message,
)
from trainers.config.errors import PEER_LOST, USAGE_ERROR, ConfigError
from trainers.rank.protocol import LAUNCH, attempt_folder, machine_folder
from trainers.storage.data_cache import FORGOTTEN, cache_root

JOIN_SECONDS = 600.0  # for all machines to come: environments are set up, file systems are slow
GONE_SECONDS = 60.0  # without a sign of life; a network file system may show a file as late as that
MARK = ".machine-0-"  # with its word, in the cache of prepared data
LOOK_SECONDS = 0.5  # between two looks at the others' files


class Machines:
    """This machine among those of the run."""

    def __init__(
        self, folder: Path, topology: Topology, given_up: Callable[[], bool], start_id: str | None = None
    ) -> None:
        self.run_folder, self.given_up, self.start_id = folder, given_up, start_id
        self.rank, self.count = topology.machine_rank, topology.num_machines
        self.ranks = f"{topology.num_processes} ranks on {'GPUs' if topology.on_gpu else 'CPUs'}"
        self.others = [number for number in range(self.count) if number != self.rank]
        self.watched = [0] if self.rank else self.others
        self.word = secrets.token_hex(8)
        self.number = 0  # of the attempt
        self.shares_cache = False  # whether the cache of machine 0 is this machine's too
        self.mark: Path | None = None  # machine 0's word in its cache
        self.counter = 0
        self.heard: dict[int, tuple[int, float]] = {}  # machine -> its number, and when it last grew
        self.awake = Wakefulness()
        self.looked = 0.0

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
        for pattern in ("start.json", "member-*", "alive-*", "refused-*"):
            for left in self._folder.glob(pattern):  # of an earlier start; who is there already writes again
                if not left.name.startswith(f"refused-{self.start_id}-"):
                    left.unlink(missing_ok=True)
        cards: dict[int, dict[str, Any]] = {}
        for _ in self._patiently():
            found = {number: read_message(self._folder / f"member-{number}.json") for number in self.others}
            cards = {n: card for n, card in found.items() if card and card["start"] == self.start_id}
            if len(cards) == len(self.others):
                break
        words = {str(number): card["word"] for number, card in cards.items()}
        odd = next((card for card in cards.values() if card["ranks"] != self.ranks), None)
        first = order() if odd is None else Order(0, 0, end=USAGE_ERROR)
        if odd is None:
            self._leave_mark()
        start = {"words": words, "machine_0": self.word, "order": asdict(first)}
        write_message(self._folder / "start.json", start)
        if odd is not None:
            raise ConfigError(
                f"launch.num_processes: machine 0 counts {self.ranks} in all, and {odd['host']} counts "
                f"{odd['ranks']}. All machines need as many GPUs; or give --num-processes."
            )
        return first

    def _leave_mark(self) -> None:
        """In the cache, where that can be written to; marks that killed launchers left are removed."""
        root = cache_root()
        for left in root.glob(f"{MARK}*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > FORGOTTEN:
                    left.unlink()
        with contextlib.suppress(OSError):
            (root / f"{MARK}{self.word}").touch()
            self.mark = root / f"{MARK}{self.word}"

    def close(self) -> None:
        if self.mark is not None:
            self.mark.unlink(missing_ok=True)

    def _present(self) -> Order:
        card = self._folder / f"member-{self.rank}.json"
        for _ in self._patiently():
            start = read_message(self._folder / "start.json")
            if start and start["words"].get(str(self.rank)) == self.word:
                self.shares_cache = (cache_root() / f"{MARK}{start['machine_0']}").exists()
                return Order(**start["order"])
            # Machine 0 empties the folder when it begins.
            if (read_message(card) or {}).get("word") != self.word:
                own = {"word": self.word, "start": self.start_id, "ranks": self.ranks}
                write_message(card, {**own, "host": socket.gethostname()})
        raise AssertionError("not reached")

    def _patiently(self) -> Iterator[None]:
        """Turns until the caller leaves the loop, for JOIN_SECONDS at most."""
        end = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < end and not self.given_up():
            for path in sorted(self._folder.glob(f"refused-{self.start_id}-*.json")):
                if refused := read_message(path):
                    raise AnotherRefused(f"machine {refused['machine']} does not begin: {refused['why']}")
            yield
            time.sleep(LOOK_SECONDS)
        if self.given_up():
            raise StoppedWaiting
        there = {number for number in self.others if (self._folder / f"member-{number}.json").exists()}
        missing = [0] if self.rank else sorted(set(self.others) - there)
        raise ConfigError(
            f"launch.num_machines: no sign of machine {', '.join(map(str, missing))} within "
            f"{JOIN_SECONDS:.0f} s. All {self.count} machines run the same command, each with its own "
            f"machine_rank, and must see the same {self.run_folder} (on a shared file system)."
        )

    def elsewhere(self) -> Ended | None:
        """How the attempt ended on another machine, where this one must end too; also a sign of life."""
        if self.count == 1 or time.monotonic() - self.looked < self.pause:
            return None
        self._sign()
        if self.rank and (cut := read_ended(self._attempt / "cut.json")):
            return cut
        for number in self.watched:
            ended = self._ended(number) or self._gone(number)
            if ended is not None and ended.early:
                self._tell(ended)
                return ended
        return None

    @property
    def pause(self) -> float:
        """Seconds between two looks: machine 0 looks at two files of each."""
        return LOOK_SECONDS if self.rank else max(LOOK_SECONDS, self.count / 200)

    def _tell(self, ended: Ended) -> None:
        """Machine 0 tells the others of an end that all must follow; the first that it sees."""
        path = self._attempt / "cut.json"
        if self.rank == 0 and not path.exists():
            write_message(path, asdict(ended))

    def settle(self, own: Ended, decide: Callable[[list[Ended]], Order]) -> Order:
        """When the attempt has ended everywhere, machine 0 decides what comes next, and all do it.

        Raises:
            GoneMachine: machine 0 is no more.
        """
        if self.count == 1:
            return decide([own])
        write_message(machine_folder(self._attempt, self.rank) / "ended.json", asdict(own))
        if self.rank:
            return self._go(self._obey())
        order = decide([own, *self._await_all()])
        write_message(self._attempt / "order.json", asdict(order))
        return self._go(order)

    def _await_all(self) -> list[Ended]:
        found: dict[int, Ended] = {}
        while len(found) < len(self.others):
            self._sign()
            for number in self.others:
                if number not in found and (ended := self._ended(number) or self._gone(number)):
                    found[number] = ended
                    if ended.early:
                        self._tell(ended)
            if len(found) < len(self.others):
                time.sleep(self.pause)
        return list(found.values())

    def _obey(self) -> Order:
        while True:
            if told := read_message(self._attempt / "order.json"):
                return Order(**told)
            self._sign()
            if self._gone(0):
                raise GoneMachine
            time.sleep(LOOK_SECONDS)

    def _ended(self, number: int) -> Ended | None:
        return read_ended(machine_folder(self._attempt, number) / "ended.json")

    def _sign(self) -> None:
        """A sign of life."""
        self.looked, awake = time.monotonic(), self.awake.look()
        self.heard = {number: (told, max(since, awake)) for number, (told, since) in self.heard.items()}
        self.counter += 1
        (self._folder / f"alive-{self.rank}").write_text(str(self.counter), encoding="utf-8")

    def _gone(self, number: int) -> Ended | None:
        now, told = time.monotonic(), read_number(self._folder / f"alive-{number}")
        before, since = self.heard[number]
        if told != before:
            self.heard[number] = told, now
            return None
        if now - since < GONE_SECONDS:
            return None
        host = (read_message(self._folder / f"member-{number}.json") or {}).get("host", "the first")
        reason = f"machine {number} ({host}) gave no sign of life for {now - since:.0f} s"
        folder = str(machine_folder(self._attempt, number))
        return Ended(number, folder, time.time(), Failure(None, reason, PEER_LOST), gone=True)

    def _go(self, order: Order) -> Order:
        self.number = order.attempt
        self.heard = {number: (-1, time.monotonic()) for number in self.watched}
        return order

    @property
    def _folder(self) -> Path:
        return self.run_folder / LAUNCH / "machines"

    @property
    def _attempt(self) -> Path:
        return attempt_folder(self.run_folder, self.number)
