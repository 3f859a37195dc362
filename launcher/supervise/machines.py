"""How the launchers of several machines coordinate: by small files in the run's folder, which they share.

    launch/machines/member-M.json           machine M has started; has its token, random for this start
    launch/machines/start.json              by machine 0: the tokens of all machines, and the first order
    launch/machines/refused-ID-M.json       why machine M, of the start with this id, does not start
    launch/machines/alive-M                 heartbeat: a number that grows while machine M's launcher lives
    launch/attempt-K/machine-M/ended.json   how the attempt ended on machine M
    launch/attempt-K/early-end.json         by machine 0: the end of one machine that all must follow
    launch/attempt-K/order.json             by machine 0, when all machines have ended: what all do next
    launch/attempt-K/prepared               by rank 0: the data is prepared (storage/data_cache.py)

Only machine 0 decides, and the others read only its files. A run on one machine writes none of these files.
Before the first attempt, machine 0 writes a file with its token into the cache of prepared data. A machine
that finds this file shares the cache.
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
from launcher.supervise.hangs import SuspensionDetector
from launcher.supervise.machine_messages import (
    AnotherRefused,
    Ended,
    MachineLost,
    Order,
    StoppedWaiting,
    read_ended,
    read_message,
    read_number,
    write_message,
)
from trainers.config.errors import PEER_LOST, USAGE_ERROR, ConfigError
from trainers.config.text import count_of
from trainers.rank import no_links
from trainers.rank.protocol import attempt_folder, machine_folder
from trainers.storage.data_cache import ABANDONED_SECONDS, cache_root
from trainers.storage.run_files import MACHINES

JOIN_SECONDS = 600.0  # for all machines to start: environments are set up, file systems are slow
LOST_SECONDS = 60.0  # without a heartbeat; a network file system may show a file that late
MARK = ".machine-0-"  # prefix of the file in the cache of prepared data; the token follows
EARLY_END = "early-end.json"
LOOK_SECONDS = 0.5  # between two looks at the files of the others


class Machines:
    """This machine among the machines of a run."""

    def __init__(
        self, folder: Path, topology: Topology, not_needed: Callable[[], bool], start_id: str | None = None
    ) -> None:
        self.run_folder, self.not_needed, self.start_id = folder, not_needed, start_id
        self.rank, self.count = topology.machine_rank, topology.num_machines
        self.ranks = f"{count_of(topology.num_processes, 'rank')} on {'GPUs' if topology.on_gpu else 'CPUs'}"
        self.others = [number for number in range(self.count) if number != self.rank]
        self.watched = [0] if self.rank else self.others
        self.token = secrets.token_hex(8)
        self.number = 0  # of the attempt
        self.shares_cache = False  # whether this machine and machine 0 have the same cache
        self.mark: Path | None = None  # machine 0's file in its cache
        self.counter = 0
        self.heard: dict[int, tuple[int, float]] = {}  # machine -> its last heartbeat, and when it changed
        self.awake = SuspensionDetector()
        self.looked = 0.0

    def join(self, order: Callable[[], Order]) -> Order:
        """Wait until all machines have started, and return machine 0's first order.

        Raises:
            ConfigError: some machines do not start. Most often they do not see the same folder.
        """
        if self.count == 1:
            return order()
        first = self._gather(order) if self.rank == 0 else self._register()
        return self._adopt(first)

    def _gather(self, order: Callable[[], Order]) -> Order:
        """On machine 0: wait for the other machines, and write start.json."""
        no_links.make_folder(self.run_folder, self._folder)
        for pattern in ("start.json", "member-*", "alive-*", "refused-*"):
            # Files of an earlier start. A machine of this start that has written already writes again.
            for left in self._folder.glob(pattern):
                if not left.name.startswith(f"refused-{self.start_id}-"):
                    no_links.remove(self.run_folder, left)
        cards: dict[int, dict[str, Any]] = {}
        for _ in self._until_timeout():
            cards = self._members()
            if len(cards) == len(self.others):
                break
        tokens = {str(number): card["token"] for number, card in cards.items()}
        unequal = next((card for card in cards.values() if card["ranks"] != self.ranks), None)
        first = order() if unequal is None else Order(0, 0, end=USAGE_ERROR)
        if unequal is None:
            self._write_mark()
        start = {"tokens": tokens, "machine_0": self.token, "order": asdict(first)}
        write_message(self.run_folder, self._folder / "start.json", start)
        if unequal is not None:
            raise ConfigError(
                f"launch.num_processes: machine 0 counts {self.ranks} in total, but {unequal['host']} counts "
                f"{unequal['ranks']}. Use the same number of GPUs on each machine, or give --num-processes."
            )
        return first

    def _members(self) -> dict[int, dict[str, Any]]:
        """Return the member files of this start. Another start may have left some."""
        found = {number: read_message(self._folder / f"member-{number}.json") for number in self.others}
        return {number: card for number, card in found.items() if card and card["start"] == self.start_id}

    def _write_mark(self) -> None:
        """Write the mark into the cache, if it is writable. Remove old marks, which killed launchers left."""
        root = cache_root()
        for left in root.glob(f"{MARK}*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()
        with contextlib.suppress(OSError):
            (root / f"{MARK}{self.token}").touch()
            self.mark = root / f"{MARK}{self.token}"

    def close(self) -> None:
        if self.mark is not None:
            self.mark.unlink(missing_ok=True)

    def _register(self) -> Order:
        """On the other machines: write the member file until start.json has this machine's token."""
        card = self._folder / f"member-{self.rank}.json"
        for _ in self._until_timeout():
            start = read_message(self._folder / "start.json")
            if start and start["tokens"].get(str(self.rank)) == self.token:
                self.shares_cache = (cache_root() / f"{MARK}{start['machine_0']}").exists()
                return Order(**start["order"])
            # Machine 0 empties the folder when it starts, so write the file again if it is gone.
            if (read_message(card) or {}).get("token") != self.token:
                own = {"token": self.token, "start": self.start_id, "ranks": self.ranks}
                write_message(self.run_folder, card, {**own, "host": socket.gethostname()})
        raise AssertionError("not reached")

    def _until_timeout(self) -> Iterator[None]:
        """Yield at each look, until the caller leaves the loop.

        Raises:
            AnotherRefused: another machine of this start does not start.
            StoppedWaiting: this machine was asked to stop.
            ConfigError: JOIN_SECONDS have passed.
        """
        end = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < end and not self.not_needed():
            for path in sorted(self._folder.glob(f"refused-{self.start_id}-*.json")):
                if refused := read_message(path):
                    raise AnotherRefused(f"machine {refused['machine']} does not start: {refused['why']}")
            yield
            time.sleep(LOOK_SECONDS)
        if self.not_needed():
            raise StoppedWaiting
        missing = [0] if self.rank else sorted(set(self.others) - self._members().keys())
        raise ConfigError(
            f"launch.num_machines: machine {', '.join(map(str, missing))} did not start within "
            f"{JOIN_SECONDS:.0f} s. Run the same command on all {self.count} machines, each with its own "
            f"machine_rank. All must see the same {self.run_folder} (on a shared file system)."
        )

    def end_on_other_machine(self) -> Ended | None:
        """Send a heartbeat. Return how the attempt ended on another machine, if this one must end too."""
        if self.count == 1 or time.monotonic() - self.looked < self.pause:
            return None
        self._send_heartbeat()
        if self.rank and (early := read_ended(self._attempt / EARLY_END)):
            return early
        for number in self.watched:
            ended = self._ended(number) or self._lost(number)
            if ended is not None and ended.early:
                self._pass_on(ended)
                return ended
        return None

    @property
    def pause(self) -> float:
        """Seconds between two looks; more on machine 0 of many machines, which reads two files of each."""
        return LOOK_SECONDS if self.rank else max(LOOK_SECONDS, self.count / 200)

    def _pass_on(self, ended: Ended) -> None:
        """On machine 0: write the first end that all machines must follow, for the others."""
        path = self._attempt / EARLY_END
        if self.rank == 0 and not path.exists():
            write_message(self.run_folder, path, asdict(ended))

    def settle(self, own: Ended, decide: Callable[[list[Ended]], Order]) -> Order:
        """Wait until the attempt has ended on all machines, and return what all do next. Machine 0 decides.

        Raises:
            MachineLost: machine 0 is lost.
        """
        if self.count == 1:
            return decide([own])
        write_message(self.run_folder, machine_folder(self._attempt, self.rank) / "ended.json", asdict(own))
        if self.rank:
            return self._adopt(self._await_order())
        order = decide([own, *self._await_all()])
        write_message(self.run_folder, self._attempt / "order.json", asdict(order))
        return self._adopt(order)

    def _await_all(self) -> list[Ended]:
        """On machine 0: wait for the ends of the other machines, or their loss."""
        found: dict[int, Ended] = {}
        while len(found) < len(self.others):
            self._send_heartbeat()
            for number in self.others:
                if number not in found and (ended := self._ended(number) or self._lost(number)):
                    found[number] = ended
                    if ended.early:
                        self._pass_on(ended)
            if len(found) < len(self.others):
                time.sleep(self.pause)
        return list(found.values())

    def _await_order(self) -> Order:
        """On the other machines: wait for machine 0's order."""
        while True:
            if message := read_message(self._attempt / "order.json"):
                return Order(**message)
            self._send_heartbeat()
            if self._lost(0):
                raise MachineLost
            time.sleep(LOOK_SECONDS)

    def _ended(self, number: int) -> Ended | None:
        return read_ended(machine_folder(self._attempt, number) / "ended.json")

    def _send_heartbeat(self) -> None:
        """Send this machine's heartbeat. After a suspension, count the silence of the others from now on."""
        self.looked, awake = time.monotonic(), self.awake.look()
        self.heard = {number: (last, max(since, awake)) for number, (last, since) in self.heard.items()}
        self.counter += 1
        alive = self._folder / f"alive-{self.rank}"
        with no_links.open_file(self.run_folder, alive, "w") as file:
            file.write(str(self.counter))

    def _lost(self, number: int) -> Ended | None:
        """Return the end of a machine that is lost: it sent no heartbeat for LOST_SECONDS. Else None."""
        now, last = time.monotonic(), read_number(self._folder / f"alive-{number}")
        before, since = self.heard[number]
        if last != before:
            self.heard[number] = last, now
            return None
        if now - since < LOST_SECONDS:
            return None
        host = (read_message(self._folder / f"member-{number}.json") or {}).get("host", "the first")
        reason = f"machine {number} ({host}) sent no heartbeat for {now - since:.0f} s"
        folder = str(machine_folder(self._attempt, number))
        return Ended(number, folder, time.time(), Failure(None, reason, PEER_LOST), lost=True)

    def _adopt(self, order: Order) -> Order:
        """Continue with the attempt of an order, and count the silence of the others from now on."""
        self.number = order.attempt
        self.heard = {number: (-1, time.monotonic()) for number in self.watched}
        return order

    @property
    def _folder(self) -> Path:
        return self.run_folder / MACHINES

    @property
    def _attempt(self) -> Path:
        return attempt_folder(self.run_folder, self.number)
