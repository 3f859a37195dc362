"""What surrounds the attempts of a run: its SLURM job, the process that forks the ranks, the last report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import machine

from launcher.config import load_run
from launcher.plan.backend import resolve_backend
from launcher.plan.topology import resolve_topology
from launcher.slurm import job as slurm
from launcher.slurm.journal import JOBS, ended
from launcher.supervise import supervisor as supervise
from launcher.supervise.diagnosis import Failure
from launcher.supervise.machine_messages import Ended
from launcher.supervise.signals import Signals
from launcher.supervise.supervisor import Supervisor
from trainers.config.errors import DATA_FAILED, SAVED
from trainers.rank.protocol import RankFiles
from trainers.storage.folder_lock import unlock_folder


def parts(number: int = 0, ranks: int = 2) -> tuple[Any, ...]:
    """Return a run on two machines, its topology and its backend, as machine `number` has them."""
    given = {"trainer": "sft", "model": "model", "project_name": "run", "distributed_backend": "ddp",
             "num_processes": ranks, "num_machines": 2, "main_process_ip": "127.0.0.1"}  # fmt: skip
    run = load_run(None, {name: str(value) for name, value in given.items()})
    topology = replace(resolve_topology(run.launch, machine(), {}), machine_rank=number)
    return run, topology, resolve_backend(run, topology)


Start = Callable[..., list[str | None]]


@pytest.fixture
def start(work: Path, packages: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start(number=1)` runs `train` on machine 1 of two, and returns the jobs that it requeues.

    A stub replaces the attempts: a warning before the job's end has stopped them.
    """
    requeued: list[str | None] = []

    class Stopped:
        def __init__(self, *given: object) -> None:
            self.requeue_job = True

        def run_to_end(self) -> int:
            return SAVED

        def close(self) -> None:
            pass

    def run(number: int = 0, accepts: bool = True) -> list[str | None]:
        monkeypatch.setattr(slurm, "requeue", lambda job: requeued.append(job) or accepts)
        assert supervise.train(*parts(number), Signals()) == SAVED
        return requeued

    monkeypatch.setattr(supervise, "Supervisor", Stopped)
    yield run
    unlock_folder()


@pytest.fixture
def in_job(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a task of job 7."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")


def test_machine_0_requeues_the_job(start: Start, in_job: None) -> None:
    assert start(number=0) == ["7"]
    assert not ended(Path("run"), "7")


def test_other_machines_do_not_requeue_the_job(start: Start, in_job: None) -> None:
    assert start(number=1) == []


def test_without_a_job_nothing_is_requeued_and_no_end_is_recorded(start: Start) -> None:
    assert start() == []
    assert not Path("run", JOBS).exists()


def test_the_end_is_recorded_if_the_job_cannot_be_requeued(start: Start, in_job: None) -> None:
    start(accepts=False)
    assert ended(Path("run"), "7")


@pytest.fixture
def supervisor(
    work: Path, packages: object, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Supervisor]]:
    """`supervisor(ranks=4)` is the supervisor on machine 0 of two, of a run with four ranks."""
    made: list[Supervisor] = []

    def make(ranks: int = 2) -> Supervisor:
        made.append(Supervisor(*parts(ranks=ranks), Signals(), None))
        return made[0]

    (work / "heartbeats").mkdir()
    monkeypatch.setattr(supervise, "make_heartbeat_folder", lambda: work / "heartbeats")
    yield make
    made[0].close()


class Forker:
    """A stub of the process that forks the ranks."""

    def __init__(self, module: str, *given: object) -> None:
        self.module, self.ended, self.spare, self.closed = module, False, False, False

    def take_over(self) -> bool:
        self.ended = not self.spare
        return self.spare

    def close(self) -> None:
        self.closed = True


def test_attempts_share_the_process_that_forks_the_ranks_until_it_ends(
    supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "WarmParent", Forker)
    made = supervisor()
    first: Any = made._warm_parent({})
    assert first.module == "trainers.sft"
    assert made._warm_parent({}) is first
    first.ended, first.spare = True, True
    assert made._warm_parent({}) is first, "its spare takes over"
    first.ended, first.spare = True, False
    assert made._warm_parent({}) is not first and first.closed


@pytest.mark.parametrize(
    ("ranks", "failed", "on", "printed"),
    [
        pytest.param(4, 0, 0, False, id="on-the-terminal-already"),
        pytest.param(4, 1, 0, True, id="another-rank-of-this-machine"),
        pytest.param(2, 1, 1, True, id="a-rank-of-another-machine"),
    ],
)
def test_the_log_of_the_failed_rank_is_printed_unless_it_is_on_the_terminal_already(
    supervisor: Callable[..., Supervisor],
    capsys: pytest.CaptureFixture[str],
    ranks: int,
    failed: int,
    on: int,
    printed: bool,
) -> None:
    folder = Path("run/launch/attempt-1")
    folder.mkdir(parents=True)
    RankFiles(folder, failed).log.write_text("the last words\n")
    failure = Failure(failed, "ValueError: a bad row", DATA_FAILED)
    assert supervisor(ranks)._give_up(failure, Ended(on, str(folder), 0.0, failure)) == DATA_FAILED
    assert ("the last words" in capsys.readouterr().err) is printed
