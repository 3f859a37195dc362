"""How the launchers of several machines coordinate. Here they are threads that share one folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher.plan.topology import Topology
from launcher.supervise import machine_messages, machines
from launcher.supervise.diagnosis import Failure
from launcher.supervise.machine_messages import (
    AnotherRefused,
    Ended,
    MachineLost,
    Order,
    StoppedWaiting,
    first_cause,
    refuse,
)
from launcher.supervise.machines import Machines
from trainers.config.errors import HUNG, KILLED, OUT_OF_MEMORY, PEER_LOST, USAGE_ERROR, ConfigError

ORDER = Order(attempt=1, port=1234)


@pytest.fixture(autouse=True)
def fast_polling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machines, "LOOK_SECONDS", 0.01)


def machine(
    folder: Path, rank: int, count: int = 2, not_needed: Callable[[], bool] = lambda: False
) -> Machines:
    return Machines(folder, Topology(count, rank, count, "here", 1), not_needed)


def ended(number: int, **values: object) -> Ended:
    return replace(Ended(number, f"machine-{number}", 0.0), **values)  # type: ignore[arg-type]


def together(folder: Path, count: int = 2) -> list[Machines]:
    """Return machines that have joined."""
    made = [machine(folder, rank, count) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        orders = list(pool.map(lambda one: one.join(lambda: ORDER), reversed(made)))
    assert orders == [ORDER] * count
    return made


def test_one_machine_decides_by_itself_and_writes_nothing(tmp_path: Path) -> None:
    single = machine(tmp_path, 0, 1)
    assert single.join(lambda: ORDER) == ORDER
    assert single.end_on_other_machine() is None
    assert single.settle(ended(0, stopped=3), lambda all_: replace(ORDER, end=all_[0].stopped)).end == 3
    single.close()
    assert list(tmp_path.iterdir()) == []


def test_all_do_what_machine_0_decides(tmp_path: Path) -> None:
    first, second, third = together(tmp_path, 3)
    failure = Failure(2, "planted", KILLED)
    seen: list[Ended] = []

    def decide(ends: list[Ended]) -> Order:
        seen.extend(ends)
        return Order(attempt=2, port=99, resume=True)

    with ThreadPoolExecutor(3) as pool:
        orders = list(
            pool.map(
                lambda pair: pair[0].settle(pair[1], decide),
                [(first, ended(0)), (second, ended(1)), (third, ended(2, failure=failure))],
            )
        )
    assert orders == [Order(2, 99, resume=True)] * 3
    assert {one.machine: one.failure for one in seen} == {0: None, 1: None, 2: failure}


def test_files_of_an_earlier_start_are_ignored(tmp_path: Path) -> None:
    """Machine 1 starts first. It finds start.json and its member file, both from the earlier start."""
    together(tmp_path)
    together(tmp_path)


def test_a_failure_on_another_machine_is_seen_and_a_good_end_is_not(tmp_path: Path) -> None:
    first, second = together(tmp_path)

    def report(end: Ended) -> None:
        path = tmp_path / "launch" / "attempt-1" / "machine-1" / "ended.json"
        machine_messages.write_message(tmp_path, path, asdict(end))

    def look() -> Ended | None:
        first.looked = 0.0
        return first.end_on_other_machine()

    assert look() is None
    report(ended(1))
    assert look() is None
    report(ended(1, stopped=15, saved="saved at step 4"))
    assert look() is None, "all ranks save, and end by themselves"
    report(ended(1, stopped=15))
    assert look() == ended(1, stopped=15)
    report(ended(1, failure=Failure(1, "planted")))
    assert look() == ended(1, failure=Failure(1, "planted"))
    assert second.number == 1


def test_a_machine_without_heartbeats_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "LOST_SECONDS", 0.2)
    first, second = together(tmp_path)
    seen: list[Ended] = []

    def decide(ends: list[Ended]) -> Order:
        seen.extend(ends)
        return replace(ORDER, end=5)

    assert first.settle(ended(0), decide).end == 5
    (gone,) = [one for one in seen if one.machine == 1]
    assert gone.lost and gone.failure is not None and gone.failure.code == PEER_LOST
    assert "sent no heartbeat for" in gone.failure.reason
    (tmp_path / "launch" / "attempt-1" / "order.json").unlink()
    with pytest.raises(MachineLost):
        second.settle(ended(1), decide)


def test_machines_that_do_not_share_the_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "JOIN_SECONDS", 0.1)
    for rank, missing in ((0, "machine 1"), (1, "machine 0")):
        folder = tmp_path / str(rank)
        with pytest.raises(
            ConfigError, match=rf"{missing} did not start within .* must see the same {folder}"
        ):
            machine(folder, rank).join(lambda: ORDER)


def test_a_machine_detects_that_it_shares_the_cache_of_machine_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    first, second = together(tmp_path)
    assert second.shares_cache and not first.shares_cache
    first.close()
    second.close()
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_a_machine_detects_that_it_has_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both machines have a folder with this path, but on different disks."""
    for number in range(2):
        (tmp_path / f"disk_{number}").mkdir()
    monkeypatch.setattr(machines, "cache_root", lambda: tmp_path / threading.current_thread().name)
    made = [machine(tmp_path, rank) for rank in range(2)]
    with ThreadPoolExecutor(2, thread_name_prefix="disk") as pool:
        list(pool.map(lambda one: one.join(lambda: ORDER), made))
    assert not made[1].shares_cache


@pytest.mark.parametrize("number", [0, 1])
def test_a_machine_that_does_not_start_reports_it(tmp_path: Path, number: int) -> None:
    """Otherwise the other machine would wait for it, and keep its GPUs."""
    refuse(tmp_path, number, None, "from an unknown start")
    assert not tmp_path.joinpath("launch").exists()
    refuse(tmp_path, number, "6.0.0", "from an earlier start")
    refuse(tmp_path, number, "7.0.0", "the folder is in use")
    topology = Topology(2, 1 - number, 2, "here", 1)
    waits = Machines(tmp_path, topology, lambda: False, "7.0.0")
    with pytest.raises(ConfigError, match=f"machine {number} does not start: the folder is in use"):
        waits.join(lambda: ORDER)


def test_machines_that_count_different_ranks_do_not_start(tmp_path: Path) -> None:
    """For example, a GPU has failed. Two ranks would have the same number, and the run would wait forever."""
    first, second = machine(tmp_path, 0), machine(tmp_path, 1)
    second.ranks = "7 ranks on GPUs"
    with ThreadPoolExecutor(2) as pool:
        order = pool.submit(second.join, lambda: ORDER)
        with pytest.raises(
            ConfigError, match=r"machine 0 counts 2 ranks on CPUs in total, but .* counts 7 ranks"
        ):
            pool.submit(first.join, lambda: ORDER).result()
        assert order.result().end == USAGE_ERROR


def test_machine_0_forwards_an_end_that_all_must_follow(tmp_path: Path) -> None:
    """The others read only its files, so that not every machine reads the files of every other."""
    first, second, third = together(tmp_path, 3)
    failed = ended(2, failure=Failure(2, "planted"))
    path = tmp_path / "launch" / "attempt-1" / "machine-2" / "ended.json"
    machine_messages.write_message(tmp_path, path, asdict(failed))
    second.looked = first.looked = 0.0
    assert second.end_on_other_machine() is None
    assert first.end_on_other_machine() == failed
    second.looked = 0.0
    assert second.end_on_other_machine() == failed
    assert list(second.heard) == list(third.heard) == [0]


def test_a_machine_is_not_lost_after_a_suspension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock continues while a job is suspended."""
    first, _ = together(tmp_path)
    assert first._lost(1) is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    first._send_heartbeat()
    assert first._lost(1) is None


def test_a_signal_ends_the_waiting(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(StoppedWaiting):
        machine(tmp_path, 1, not_needed=lambda: time.monotonic() > began + 0.1).join(lambda: ORDER)


def test_which_of_several_failures_is_the_cause() -> None:
    lost = ended(0, time=1.0, failure=Failure(None, "", PEER_LOST))
    killed = ended(1, time=2.0, failure=Failure(1, "", KILLED))
    waits = ended(0, time=1.0, failure=Failure(0, "", HUNG, waits=True))
    hangs = ended(1, time=2.0, failure=Failure(1, "", HUNG))
    short = ended(2, time=9.0, failure=Failure(2, "", OUT_OF_MEMORY))
    gone = ended(3, time=9.0, lost=True, failure=Failure(None, "", PEER_LOST))
    assert first_cause([lost, killed])[0] is killed
    assert first_cause([waits, hangs])[0] is hangs
    assert first_cause([killed, short])[0] is short
    assert first_cause([lost, gone])[0] is gone


def test_start_json_has_the_order_and_the_words(tmp_path: Path) -> None:
    together(tmp_path)
    start = json.loads((tmp_path / "launch" / "machines" / "start.json").read_text())
    assert start["order"]["attempt"] == 1 and set(start["tokens"]) == {"1"}


def test_a_machine_of_another_start_is_ignored(tmp_path: Path) -> None:
    """A config was submitted twice: machine 1 of the second job starts before its machine 0 is refused."""
    topologies = [Topology(2, rank, 2, "here", 1) for rank in range(2)]
    other = Machines(tmp_path, topologies[1], lambda: False, "8.0.0")
    first, second = (Machines(tmp_path, topology, lambda: False, "7.0.0") for topology in topologies)
    with ThreadPoolExecutor(3) as pool:
        lost = pool.submit(other.join, lambda: ORDER)
        began = pool.submit(first.join, lambda: ORDER)
        time.sleep(0.1)
        refuse(tmp_path, 0, "8.0.0", "the folder is in use")
        with pytest.raises(AnotherRefused):
            lost.result()
        assert pool.submit(second.join, lambda: ORDER).result() == began.result() == ORDER
