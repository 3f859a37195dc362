"""The policy of a run's attempts: what is restarted and from where, when the run gives up, and its exit code.

A stub replaces each attempt: it writes the checkpoints and the notes of ranks that ended in the given way.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_checkpoint, machine

from launcher.config import load_run
from launcher.plan.backend import resolve_backend
from launcher.plan.topology import resolve_topology
from launcher.slurm import job as slurm
from launcher.supervise import restarts
from launcher.supervise import supervisor as supervise
from launcher.supervise.attempt import Outcome
from launcher.supervise.hangs import Hang
from launcher.supervise.restarts import PAUSES, WITHOUT_PROGRESS
from launcher.supervise.signals import Signals
from launcher.supervise.supervisor import Supervisor
from trainers.config.errors import (
    DATA_FAILED,
    DISK_FAILED,
    HUNG,
    KILLED,
    NOT_FINITE,
    OUT_OF_MEMORY,
    PEER_LOST,
    RUN_FAILED,
    SAVED,
    USAGE_ERROR,
)
from trainers.rank.heartbeat import STEP, Heartbeat
from trainers.rank.protocol import LAUNCH, AttemptFiles
from trainers.storage.folder_lock import InUse
from trainers.storage.manifest import MANIFEST


@dataclass
class Ends:
    """How an attempt ends: its exit code, the note of rank 1, and the checkpoint that it writes."""

    code: int = 1
    saves: int = 0  # the step of a checkpoint
    verifies: bool = True  # whether that checkpoint does
    kind: str = ""  # the error in the note of rank 1
    of: int = RUN_FAILED  # its class
    exits: dict[int, int] = field(default_factory=dict)
    hang: Hang | None = None
    stopped: str | None = None  # what the ranks report as saved, if a signal stopped them
    received: int | None = None  # a signal that arrives during the attempt


WELL = Ends(0)


def killed(saves: int = 0) -> Ends:
    return Ends(saves=saves, exits={0: 1, 1: -signal.SIGKILL})


def fails(kind: str, code: int = RUN_FAILED, saves: int = 0) -> Ends:
    return Ends(saves=saves, kind=kind, of=code, exits={1: 1})


HANGS = Ends(hang=Hang(1, 75.0, Heartbeat(0.0, 50, 6, 0.5, STEP), False, ""))


@dataclass
class Done:
    """The result of a run."""

    code: int
    configs: list[tuple[bool | str, bool]]  # resume and overwrite of each attempt
    pauses: list[float]
    err: list[str]
    requeued: bool = False

    @property
    def attempts(self) -> int:
        return len(self.configs)


class Life:
    """A run whose attempts end as a test specifies."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capsys = patch, capsys
        self.signals = Signals()
        self.after_pause: Callable[[], None] = lambda: None

    def supervisor(self, **flags: Any) -> Supervisor:
        given = {"trainer": "sft", "model": "model", "project_name": "run", "num_processes": 2,
                 "distributed_backend": "ddp", **flags}  # fmt: skip
        run = load_run(None, {name: str(value) for name, value in given.items()})
        topology = resolve_topology(run.launch, machine(), {})
        return Supervisor(run, topology, resolve_backend(run, topology), self.signals, None)

    def __call__(self, *ends: Ends, **flags: Any) -> Done:
        """Run one attempt for each of the ends. The test fails if the run makes more or fewer."""
        done = Done(0, [], [], [])
        left = iter(ends)

        def attempt(supervisor: Supervisor) -> Outcome:
            done.configs.append((supervisor.run.train.resume, supervisor.run.train.overwrite))
            end = next(left, None)
            assert end is not None, "an attempt too many"
            return self._leave(end, len(done.configs))

        def pause(supervisor: Supervisor, seconds: float) -> None:
            done.pauses.append(seconds)
            self.after_pause()

        self.patch.setattr(Supervisor, "_attempt", attempt)
        self.patch.setattr(Supervisor, "_pause", pause)
        supervisor = self.supervisor(**flags)
        try:
            done.code = supervisor.run_to_end()
        finally:
            supervisor.close()
        done.requeued = supervisor.requeue_job
        assert next(left, None) is None, "an attempt too few"
        done.err = self.capsys.readouterr().err.splitlines()
        return done

    def _leave(self, end: Ends, number: int) -> Outcome:
        folder = Path("run", LAUNCH, f"attempt-{number}").resolve()
        folder.mkdir(parents=True)
        if end.saves:
            saved = fake_checkpoint(Path("run"), end.saves)
            if not end.verifies:
                (saved / MANIFEST).unlink()
        if end.kind:
            note = {"rank": 1, "time": 1.0, "code": end.of, "type": end.kind, "message": "planted"}
            (folder / "rank-1.error.json").write_text(json.dumps({**note, "peer_lost": end.of == PEER_LOST}))
        if end.stopped is not None:
            for rank, saved in ((0, ""), (1, end.stopped)):
                text = json.dumps({"rank": rank, "signal": signal.SIGTERM, "saved": saved})
                (folder / f"rank-{rank}.stopped.json").write_text(text)
        if end.received is not None:
            self.signals.received = end.received
        return Outcome(AttemptFiles(folder), end.code, end.exits, end.hang)


@pytest.fixture
def life(
    work: Path, packages: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Life]:
    def make() -> Path:
        (work / "heartbeats").mkdir()
        return work / "heartbeats"

    monkeypatch.setattr(supervise, "make_heartbeat_folder", make)
    yield Life(monkeypatch, capsys)
    assert not (work / "heartbeats").exists(), "close() did not remove the folder of the heartbeats"


def test_a_run_that_ends_well_is_one_attempt(life: Life) -> None:
    done = life(WELL)
    assert (done.code, done.configs, done.err) == (0, [(False, False)], [])


def test_a_killed_run_resumes_from_its_newest_checkpoint(life: Life) -> None:
    done = life(killed(saves=4), WELL)
    assert (done.code, done.configs) == (0, [(False, False), (True, False)])
    assert done.err == [
        "warning: "
        "rank 1 failed first: killed by SIGKILL (host memory ran out, or by hand); restart 1 of at most 10, "
        "from run/checkpoint-4"
    ]


def test_without_a_checkpoint_it_restarts_from_the_start(life: Life) -> None:
    done = life(killed(), WELL)
    assert done.configs == [(False, False), (False, False)]
    assert done.err[0].endswith("restart 1 of at most 10, from the start")


def test_a_checkpoint_that_does_not_verify_is_skipped(life: Life, work: Path) -> None:
    fake_checkpoint(work / "run", 4)
    (fake_checkpoint(work / "run", 8) / MANIFEST).unlink()
    assert life(killed(), WELL, resume=True).err[0].endswith("from run/checkpoint-4")


def test_overwrite_applies_only_to_the_first_attempt(life: Life) -> None:
    assert life(killed(saves=4), WELL, overwrite=True).configs == [(False, True), (True, False)]


def test_a_named_checkpoint_is_used_until_there_is_a_newer_one(life: Life, work: Path) -> None:
    fake_checkpoint(work / "other", 3)
    done = life(killed(), killed(saves=5), WELL, resume="other/checkpoint-3")
    assert [resume for resume, _ in done.configs] == ["other/checkpoint-3", "other/checkpoint-3", True]


def test_changed_settings_have_the_reason_as_source(life: Life) -> None:
    supervisor = life.supervisor()
    fake_checkpoint(Path("run"), 4)
    supervisor.restarts.look()
    run = supervisor.restarts.resumed(supervisor.run)
    assert {name: run.settings.sources[name] for name in ("resume", "overwrite", "lr")} == {
        "resume": "a restart",
        "overwrite": "a restart",
        "lr": "default",
    }
    supervisor.close()


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (killed(), KILLED),
        (HANGS, HUNG),
        (fails("RuntimeError"), RUN_FAILED),
        (fails("RuntimeError", PEER_LOST), PEER_LOST),
    ],
)
def test_a_failure_that_a_restart_can_fix_is_restarted(life: Life, end: Ends, code: int) -> None:
    assert life(end, max_restarts=0).code == code
    shutil.rmtree("run")
    assert life(end, WELL).code == 0


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (fails("ConfigError", USAGE_ERROR), USAGE_ERROR),
        (fails("TypeError"), RUN_FAILED),
        (fails("KeyError"), RUN_FAILED),
        (fails("OutOfMemoryError", OUT_OF_MEMORY), OUT_OF_MEMORY),
        (fails("NotFinite", NOT_FINITE), NOT_FINITE),
        (fails("ValueError", DATA_FAILED), DATA_FAILED),
        (fails("OSError", DISK_FAILED), DISK_FAILED),
    ],
)
def test_a_failure_that_would_repeat_ends_the_run_at_once(life: Life, end: Ends, code: int) -> None:
    done = life(replace(end, saves=4))  # even with progress
    assert (done.code, done.attempts, done.pauses) == (code, 1, [])
    assert not any("restart" in line for line in done.err)


def test_nan_is_restarted_only_if_the_config_says_so(life: Life) -> None:
    done = life(fails("NotFinite", NOT_FINITE, saves=4), WELL, restart_on_nan=True)
    assert (done.code, done.configs[1]) == (0, (True, False))


def test_three_attempts_without_progress_end_the_run(life: Life) -> None:
    done = life(killed(), killed(), killed())
    assert (done.code, done.attempts) == (KILLED, WITHOUT_PROGRESS)
    assert "       3 attempts in a row made no progress; the run is not restarted." in done.err
    assert done.err[-1].endswith("run/launch/attempt-3"), "the logs are those of the last attempt"


def test_an_earlier_checkpoint_is_not_progress(life: Life, work: Path) -> None:
    fake_checkpoint(work / "run", 8)
    assert life(killed(), killed(), killed(), resume=True).attempts == WITHOUT_PROGRESS


def test_a_checkpoint_that_does_not_verify_is_not_progress(life: Life) -> None:
    ends = (replace(killed(saves=step), verifies=False) for step in (4, 8, 12))
    assert life(*ends).attempts == WITHOUT_PROGRESS


def test_failures_of_several_kinds_count_together(life: Life) -> None:
    assert life(killed(), HANGS, fails("RuntimeError")).code == RUN_FAILED


def test_progress_resets_the_count(life: Life) -> None:
    done = life(killed(), killed(), killed(saves=4), killed(), killed(), WELL)
    assert (done.code, done.attempts) == (0, 6)
    assert "restart 5 of at most 10" in done.err[-1]


def test_max_restarts_0_means_no_restart(life: Life) -> None:
    done = life(killed(saves=4), max_restarts=0)
    assert (done.code, done.attempts) == (KILLED, 1)
    assert done.err[0].startswith("error: rank 1 failed first: killed by SIGKILL")


def test_restarts_are_counted_over_the_full_run(life: Life) -> None:
    done = life(killed(saves=1), killed(saves=2), killed(saves=3), max_restarts=2)
    assert (done.code, done.attempts) == (KILLED, 3)
    assert [line.partition("; ")[2] for line in done.err[:2]] == [
        "restart 1 of at most 2, from run/checkpoint-1",
        "restart 2 of at most 2, from run/checkpoint-2",
    ]


def test_a_pause_follows_two_attempts_without_progress(life: Life) -> None:
    done = life(killed(), killed(), killed(saves=4), killed(), WELL)
    assert done.pauses == [PAUSES[0], PAUSES[1], PAUSES[0], PAUSES[0]]
    assert PAUSES[0] < PAUSES[1]


def test_smaller_batches_are_not_counted_as_restarts(life: Life) -> None:
    short = fails("BatchTooLarge", OUT_OF_MEMORY)
    done = life(short, killed(saves=4), short, WELL, batch_size=8, auto_find_batch_size=True, max_restarts=1)
    assert (done.code, done.attempts) == (0, 4)
    assert [resume for resume, _ in done.configs] == [False, False, True, True]
    assert [line.partition("; ")[2] for line in done.err] == ["restart 1 of at most 1, from run/checkpoint-4"]


def test_a_run_that_was_stopped_and_saved_exits_with_75(life: Life) -> None:
    done = life(Ends(0, saves=7, stopped="saved at step 7", received=signal.SIGTERM))
    assert (done.code, done.attempts) == (SAVED, 1)
    assert done.err == ["stopped by SIGTERM: saved at step 7; `phalanx train` with --resume continues"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_was_stopped_before_it_saved_exits_with_128_plus_the_signal(
    life: Life, number: int
) -> None:
    done = life(Ends(0, stopped="", received=number))
    assert (done.code, done.attempts) == (128 + number, 1)
    assert done.err[0].startswith(f"stopped by {signal.Signals(number).name}: nothing was saved; logs: ")


@pytest.mark.parametrize("when", ["in an attempt", "between two attempts", "before the first one"])
def test_a_signal_without_a_save_names_the_checkpoint_that_a_resume_continues_from(
    life: Life, when: str
) -> None:
    fake_checkpoint(Path("run"), 4)
    if when == "in an attempt":
        done = life(Ends(0, stopped="", received=signal.SIGTERM))
    elif when == "between two attempts":
        life.after_pause = lambda: setattr(life.signals, "received", signal.SIGTERM)
        done = life(killed())
    else:
        life.signals.received = signal.SIGTERM
        done = life()
    [line] = [line for line in done.err if line.startswith("stopped by SIGTERM")]
    assert "--resume continues from the newest checkpoint, run/checkpoint-4" in line
    assert "nothing was saved" not in line and done.code == 128 + signal.SIGTERM


def test_ranks_that_a_second_signal_killed_are_not_restarted(life: Life) -> None:
    done = life(replace(killed(saves=4), code=-signal.SIGKILL, received=signal.SIGINT))
    assert (done.code, done.attempts) == (128 + signal.SIGINT, 1)


def test_a_signal_that_comes_too_late_does_not_change_a_successful_run(life: Life) -> None:
    done = life(replace(WELL, received=signal.SIGTERM))
    assert (done.code, done.err) == (0, [])


def test_a_signal_between_two_attempts_stops_the_run(life: Life) -> None:
    life.after_pause = lambda: setattr(life.signals, "received", signal.SIGTERM)
    done = life(killed(saves=4))
    assert done.attempts == 1
    assert any(line.startswith("stopped by SIGTERM") for line in done.err)


def test_a_signal_between_two_attempts_gives_its_exit_code(life: Life) -> None:
    life.after_pause = lambda: setattr(life.signals, "received", signal.SIGTERM)
    assert life(killed()).code == 128 + signal.SIGTERM


def test_a_signal_ends_a_pause(life: Life) -> None:
    supervisor = life.supervisor()
    threading.Timer(0.2, lambda: setattr(life.signals, "received", signal.SIGTERM)).start()
    began = time.monotonic()
    supervisor._pause(60.0)
    assert 0.1 < time.monotonic() - began < 30.0
    supervisor.close()


def test_a_pause_lasts_the_given_time(life: Life) -> None:
    supervisor = life.supervisor()
    began = time.monotonic()
    supervisor._pause(0.0)
    assert time.monotonic() - began < 0.1
    supervisor._pause(0.3)
    assert time.monotonic() - began >= 0.3
    supervisor.close()


def test_the_order_says_resume_after_a_restart_but_not_for_a_named_checkpoint(
    life: Life,
) -> None:
    """Each machine has the named checkpoint in its own command. All must run the same config."""
    saved = fake_checkpoint(Path("run"), 4)
    supervisor = life.supervisor(resume=str(saved))
    assert supervisor._order().resume is False
    supervisor.restarts.look()
    supervisor.run = supervisor.restarts.resumed(supervisor.run)
    assert supervisor._order().resume is True
    supervisor.close()


@pytest.mark.parametrize(
    ("number", "preempted", "requeued"),
    [
        (signal.SIGUSR1, False, True),
        (signal.SIGTERM, False, False),
        (signal.SIGTERM, True, True),
        (signal.SIGINT, False, False),
    ],
)
@pytest.mark.parametrize("moment", ["before", "within", "between"])
def test_whether_the_job_is_requeued_after_a_signal(
    life: Life, monkeypatch: pytest.MonkeyPatch, moment: str, number: int, preempted: bool, requeued: bool
) -> None:
    """The moment makes no difference: before the first attempt, within an attempt, or between two."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 3600))
    monkeypatch.setattr(slurm, "preempted", lambda job: preempted)
    if moment == "before":
        life.signals.received = number
        done = life()
    elif moment == "within":
        done = life(Ends(0, saves=7, stopped="saved at step 7", received=number))
    else:
        life.after_pause = lambda: setattr(life.signals, "received", number)
        done = life(killed(saves=4))
    assert done.requeued is requeued
    assert done.code == (SAVED if moment == "within" else 128 + number)


def test_nothing_is_overwritten_after_a_signal(life: Life) -> None:
    supervisor = life.supervisor(overwrite=True)
    supervisor.close()
    saved = fake_checkpoint(Path("run"), 4)
    life.signals.received = signal.SIGINT
    code = supervise.train(supervisor.run, supervisor.topology, supervisor.backend, life.signals)
    assert code == 128 + signal.SIGINT
    assert saved.is_dir()


def test_the_start_waits_for_a_lock_that_is_released_soon(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`phalanx status` holds it for a moment. A file server may keep the lock of a lost node for minutes."""
    asked: list[Path] = []

    def lock_folder(folder: Path) -> None:
        asked.append(folder)
        if len(asked) < 3:
            raise InUse("it is in use")

    monkeypatch.setattr(supervise, "lock_folder", lock_folder)
    monkeypatch.setattr(supervise, "TAKE_SECONDS", 60.0)
    supervisor = life.supervisor()
    supervisor.close()
    run = supervisor.run
    supervise._take_folder(run, None, life.signals)
    assert len(asked) == 3
    monkeypatch.setattr(supervise, "TAKE_SECONDS", -1.0)
    asked.clear()
    with pytest.raises(InUse):
        supervise._take_folder(run, None, life.signals)


def test_the_newest_checkpoint_is_searched_once_per_attempt(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = restarts.newest_usable
    monkeypatch.setattr(
        restarts, "newest_usable", lambda *given, **named: looks.append(1) or look(*given, **named)
    )
    assert life(killed(saves=4), killed(saves=8), WELL).attempts == 3
    assert len(looks) == 1 + 3
