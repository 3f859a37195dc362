"""Several machines: two launchers with a rank each share a folder, and restart, stop and end together."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest
from planted import Running, alive
from ranks import Finished

SAVED = 75


@dataclass
class Pair:
    """The launchers of both machines."""

    running: list[Running]

    def end(self) -> list[Finished]:
        return [one.end() for one in self.running]


@pytest.fixture
def pair(faults):
    def start(name: str, backend: str, *flags: str, **fault: object) -> Pair:
        where = ["--num-machines", "2", "--main-process-ip", "127.0.0.1"]
        return Pair(
            [
                faults.start(name, backend, *where, "--machine-rank", str(number), *flags, **fault)
                for number in (0, 1)
            ]
        )

    return start


def folder_of(running: Running, number: int, attempt: int = 1):
    return running.folder / "launch" / f"attempt-{attempt}" / f"machine-{number}"


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_killed_rank_restarts_both(faults, pair, backend):
    first, second = pair(f"machines-kill-{backend}", backend, what="kill", rank=1, step=6).end()
    assert second.code == 0, second.out + second.err
    faults.same_end(first, backend)
    assert "network: GLOO_SOCKET_IFNAME=lo, between the 2 machines" in first.out
    assert "rank 1 failed first: killed by SIGKILL" in first.err
    assert "restart 1 of at most 10, from" in first.err and "checkpoint-4" in first.err
    assert alive(first.folder) == []
    assert not (first.folder / "launch" / "attempt-3").exists()


def test_a_signal_to_one_launcher_stops_both(faults, pair):
    running = pair("machines-term", "ddp", pause=0.3)
    running.running[0].wait_for_step(5)
    running.running[1].process.send_signal(signal.SIGTERM)
    first, second = running.end()
    assert (first.code, second.code) == (SAVED, SAVED), first.out + first.err
    assert "saved at step" in first.err
    resumed = pair("machines-term", "ddp", "--resume").end()
    assert resumed[1].code == 0
    faults.same_end(resumed[0], "ddp")


def test_a_failure_that_would_repeat_ends_both(pair):
    first, second = pair("machines-mistake", "ddp", what="mistake", rank=1, step=2).end()
    assert (first.code, second.code) == (1, 1)
    assert "rank 1 failed first: TypeError: planted mistake" in first.err
    assert "machine-1/rank-1.log" in first.err
    assert "error" not in second.err


@pytest.mark.slow
def test_a_lost_machine_ends_the_run(pair):
    """Its launcher is killed, and its ranks with it. Nothing else can start them again."""
    running = pair("machines-gone", "ddp", pause=0.3)
    running.running[0].wait_for_step(2)
    running.running[1].process.kill()
    first, _ = running.end()
    assert first.code == 5
    assert "machine 1" in first.err and "sent no heartbeat for" in first.err
    assert alive(first.folder) == []
