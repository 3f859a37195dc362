"""Heartbeats: what a rank writes and when, and which rank the launcher finds to hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.supervise import hangs
from launcher.supervise.hangs import find_hang, limit, make_heartbeat_folder
from trainers.rank import heartbeat
from trainers.rank.heartbeat import STEP, Heart, Heartbeat, read_heartbeat
from trainers.rank.protocol import HEARTBEATS, AttemptFiles

PATIENCE = 20.0  # seconds; a limit, not a measurement


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heart]:
    """The heartbeats of rank 3. Its thread sends a hundred per second; it is not started yet."""
    monkeypatch.setenv(HEARTBEATS, str(tmp_path))
    monkeypatch.setattr(heartbeat, "PERIOD", 0.01)
    made = Heart()
    yield made
    made.steady.clear()  # its thread then sleeps until the end


@pytest.fixture
def last(tmp_path: Path) -> Callable[[], Heartbeat]:
    """`last()` returns the last heartbeat of rank 3, as the launcher reads it."""

    def read() -> Heartbeat:
        found: list[Heartbeat | None] = []
        wait_for(lambda: bool(found.append(read_heartbeat(tmp_path / "rank-3")) or found[-1]))
        assert found[-1] is not None
        return found[-1]

    return read


def test_before_its_first_heartbeat_a_rank_has_none(tmp_path: Path) -> None:
    path = tmp_path / "rank-3"
    assert read_heartbeat(path) is None
    path.write_bytes(b"")
    assert read_heartbeat(path) is None
    path.write_bytes(bytes(64))
    assert read_heartbeat(path) is None


def test_the_start_is_the_first_heartbeat(heart: Heart, last: Callable[[], Heartbeat]) -> None:
    before = time.monotonic()
    heart.start(3)
    beat = last()
    assert before <= beat.time <= time.monotonic()
    assert (beat.step, beat.step_seconds, beat.phase) == (0, 0.0, "start")
    assert beat.count >= 1


def test_the_end_of_a_step_is_a_heartbeat_with_the_step(heart: Heart, last: Callable[[], Heartbeat]) -> None:
    heart.start(3)
    heart.stepped(1)
    heart.stepped(2)
    first = last()
    heart.beat()
    assert (first.step, first.phase) == (2, STEP)
    assert last().count > first.count


def test_without_a_launcher_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEARTBEATS, raising=False)
    heart = Heart()
    heart.start(3)
    heart.stepped(1)
    with heart.during("save"):
        heart.beat()
    assert heart.file is None
    assert list(tmp_path.iterdir()) == []


def test_a_long_name_of_a_phase_is_cut(heart: Heart, last: Callable[[], Heartbeat]) -> None:
    heart.start(3)
    heart.enter("x" * 100)
    assert last().phase == "x" * 32


def test_the_thread_sends_heartbeats_in_phases_without_steps(
    heart: Heart, last: Callable[[], Heartbeat]
) -> None:
    heart.start(3)
    for phase in ("start", "save", "end"):
        heart.enter(phase)
        count, times = last().count, set()
        wait_for(lambda: times.add(last().time) or len(times) > 3)  # noqa: B023
        assert last().phase == phase and last().count == count  # heartbeats without progress


def test_in_steps_only_the_main_thread_sends_heartbeats(heart: Heart, last: Callable[[], Heartbeat]) -> None:
    heart.start(3)
    heart.stepped(1)
    time.sleep(0.1)  # the thread may be about to send a heartbeat
    before = last()
    time.sleep(0.3)
    assert last() == before
    heart.beat()
    assert last().count == before.count + 1


def test_after_a_phase_the_previous_one_continues(heart: Heart, last: Callable[[], Heartbeat]) -> None:
    heart.start(3)
    heart.stepped(1)
    with heart.during("evaluate"):
        heart.enter(STEP)  # after a batch of the evaluation
        with heart.during("save"):
            assert last().phase == "save"
        assert last().phase == STEP
    assert last().phase == STEP
    assert not heart.steady.is_set()


def test_a_phase_with_an_error_ends_too(heart: Heart, last: Callable[[], Heartbeat]) -> None:
    heart.start(3)
    heart.stepped(1)
    with pytest.raises(OSError), heart.during("save"):
        raise OSError
    assert last().phase == STEP


def test_loading_the_best_model_is_a_phase_without_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading may take long, and no step ends during it."""
    from transformers import Trainer

    from trainers.checkpoint import resuming
    from trainers.checkpoint.saving import Durable

    phases = []
    monkeypatch.setattr(resuming, "heart", Heart())
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: phases.append(resuming.heart.phase))
    trainer = object.__new__(Durable)
    trainer._saving, trainer.is_fsdp_enabled = SimpleNamespace(pending=None), False
    resuming.heart.stepped(1)
    trainer._load_best_model()
    assert len(phases) == 1 and phases[0] != STEP


def test_the_seconds_of_a_step_are_a_median_without_the_time_between_steps(
    heart: Heart, last: Callable[[], Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    heart.start(3)
    step = 0

    def steps(*seconds: float) -> None:
        nonlocal now, step
        for passed in seconds:
            now += passed
            step += 1
            heart.stepped(step)

    steps(500.0)  # the first step includes loading and compiling
    assert last().step_seconds == 0.0
    steps(1.0, 1.0, 9.0, 2.0)
    assert last().step_seconds == 1.5
    for phase in ("save", "evaluate"):
        with heart.during(phase):
            now += 600.0
        steps(3.0)
    assert list(heart.recent) == [1.0, 1.0, 9.0, 2.0]
    steps(2.0)
    assert last().step_seconds == 2.0


def test_setting_the_clock_back_changes_nothing(
    heart: Heart, last: Callable[[], Heartbeat], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart.start(3)
    heart.stepped(1)
    before = last()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    heart.stepped(2)
    heart.stepped(3)
    after = last()
    assert before.time <= after.time <= time.monotonic()
    assert 0 <= after.step_seconds < PATIENCE
    assert find_hang(tmp_path, {3: os.getpid()}, 60.0, AttemptFiles(tmp_path)) is None


# A rank, as far as the watcher sees it. It writes its stack on the signal, and waits: for others (in a frame
# of torch.distributed), or by itself (in a frame of transformers).
RANK = """
import sys, threading, time
from pathlib import Path
from trainers.rank.process import _dump_stack_on_signal

_dump_stack_on_signal(Path(sys.argv[1]))
code = "import time\\ndef stay():\\n    print('here', flush=True)\\n    time.sleep(600)\\n"
files = {"others": "/lib/torch/distributed/distributed_c10d.py", "itself": "/lib/transformers/trainer.py"}
exec(compile(code, files[sys.argv[2]], "exec"))
stay()
"""
# Writes its stack in two parts, as faulthandler does on a busy processor.
SLOW_RANK = """
import os, signal, sys, time
from trainers.rank.signals import STACK_SIGNAL

def write(number, frame):
    with open(sys.argv[1], "w") as file:
        for part in ("Thread 0x1 (most recent call first):\\n", "\\nCurrent thread 0x2\\n  in culprit\\n"):
            file.write(part)
            file.flush()
            time.sleep(0.3)

signal.signal(STACK_SIGNAL, write)
print("here", flush=True)
while True:
    time.sleep(600)
"""


class Ranks:
    """Processes that stand for ranks, and the heartbeats that a test writes for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *where: str, script: str = RANK) -> dict[int, int]:
        """Start one rank for each place, and return rank -> pid."""
        for rank, place in enumerate(where):
            argv = [sys.executable, "-c", script, str(self.folder / f"rank-{rank}.stack"), place]
            self.started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        for process in self.started:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        return {rank: process.pid for rank, process in enumerate(self.started)}

    def beat(self, rank: int, ago: float = 100.0, count: int = 50, step: int = 6, phase: str = STEP) -> None:
        """Write the last heartbeat of a rank, `ago` seconds in the past."""
        raw = heartbeat._LAYOUT.pack(time.monotonic() - ago, count, step, 0.5, phase.encode())
        (self.folder / f"rank-{rank}").write_bytes(raw)

    def find(self, pids: dict[int, int], timeout: float | None = None) -> hangs.Hang | None:
        return find_hang(self.folder, pids, timeout, AttemptFiles(self.folder))

    def named(self, pids: dict[int, int]) -> int:
        found = self.find(pids)
        assert found is not None
        return found.rank


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_no_rank_hangs_while_all_send_heartbeats(ranks: Ranks) -> None:
    pids = ranks.start("others", "itself")
    ranks.beat(0, ago=59.0)
    ranks.beat(1, ago=1.0)
    assert ranks.find(pids) is None
    assert (ranks.folder / "rank-0.stack").read_text() == "", "no stack was requested"


def test_a_rank_without_a_first_heartbeat_is_starting_and_does_not_hang(ranks: Ranks) -> None:
    assert ranks.find(ranks.start("itself")) is None


def test_time_in_which_the_launcher_did_not_run_does_not_count(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job is suspended with all its processes, but its clock continues."""
    pids = ranks.start("others", "itself")
    now = time.monotonic()
    wakefulness = hangs.SuspensionDetector()
    for rank in pids:
        ranks.beat(rank, ago=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600.0)
    awake = wakefulness.look()
    assert ranks.find(pids) is not None, "without `awake`, both ranks have no heartbeat for an hour"
    assert find_hang(ranks.folder, pids, None, AttemptFiles(ranks.folder), awake) is None
    for _ in range(10):
        now += hangs.SHORTEST / 5
        assert wakefulness.look() == awake, "short intervals between two looks are not a pause"
    hang = find_hang(ranks.folder, pids, None, AttemptFiles(ranks.folder), awake)
    assert hang is not None and hang.rank == 1


def test_a_stopped_rank_is_named_whatever_its_heartbeats_are(ranks: Ranks) -> None:
    pids = ranks.start("itself", "others")
    os.kill(pids[1], signal.SIGSTOP)
    wait_for(lambda: hangs._is_stopped(pids[1]))
    ranks.beat(0, count=50, ago=80.0)
    ranks.beat(1, count=51, ago=75.0)
    hang = ranks.find(pids)
    assert hang is not None
    assert (hang.rank, hang.stopped) == (1, True)
    assert hang.reason == (
        "stopped (SIGSTOP, or a debugger): no heartbeat for 75 s, in phase 'step' after step 6"
    )
    assert "in stay" in hang.stack, "it continued, to write its stack"


def test_the_rank_at_the_earliest_step_is_named(ranks: Ranks) -> None:
    pids = ranks.start("others", "others", "itself")
    ranks.beat(0, count=51)
    ranks.beat(1, count=48, step=5, ago=64.0)
    ranks.beat(2, count=51)
    hang = ranks.find(pids)
    assert hang is not None
    assert (hang.rank, hang.stopped, hang.beat.step) == (1, False, 5)
    assert hang.reason == "hung: no heartbeat for 64 s, in phase 'step' after step 5"


def test_at_the_same_step_the_rank_that_does_not_wait_for_others_is_named(
    ranks: Ranks,
) -> None:
    pids = ranks.start("others", "itself", "others")
    for rank in pids:
        ranks.beat(rank, ago=90.0 - rank)
    hang = ranks.find(pids)
    assert hang is not None and hang.rank == 1
    assert "in stay" in hang.stack and "torch/distributed" not in hang.stack


def test_a_rank_that_sends_heartbeats_does_not_hang(ranks: Ranks) -> None:
    """Rank 0 started later, and waits for the other in a phase in which its thread sends heartbeats."""
    pids = ranks.start("others", "itself")
    ranks.beat(0, ago=0.1, count=20, phase="save")
    ranks.beat(1, ago=90.0, count=50)
    assert ranks.named(pids) == 1


def test_heartbeats_of_the_thread_do_not_count_as_progress(ranks: Ranks) -> None:
    """Two ranks did the same steps, but the second loaded for longer. In step 7 the first waits for it."""
    counts = []
    for beats_by_thread in (4, 9):
        heart = Heart()
        heart.file = memoryview(bytearray(64))  # type: ignore[assignment]
        heart.enter("start")
        for _ in range(beats_by_thread):
            heart.beat()
        for step in range(1, 7):
            heart.beat()  # a micro-batch
            heart.stepped(step)
        counts.append(heart.count)
    pids = ranks.start("others", "itself")
    for rank in pids:
        ranks.beat(rank, count=counts[rank])
    assert ranks.named(pids) == 1


def test_the_launcher_waits_for_a_stack_that_is_being_written(ranks: Ranks) -> None:
    pids = ranks.start("slow", script=SLOW_RANK)
    ranks.beat(0)
    hang = ranks.find(pids)
    assert hang is not None and "in culprit" in hang.stack


def test_a_rank_that_is_gone_does_not_prevent_the_search(ranks: Ranks) -> None:
    pids = ranks.start("itself", "others")
    ranks.started[1].kill()
    ranks.started[1].wait()
    ranks.beat(0, count=50)
    ranks.beat(1, count=51)
    assert ranks.named(pids) == 0


@pytest.mark.parametrize(
    ("frames", "waits"),
    [
        (["/lib/torch/distributed/distributed_c10d.py"], True),
        (["/lib/torch/autograd/graph.py"], True),
        (["/lib/torch/_tensor.py"], True),
        (["/work/trainers/rank/agreement.py"], True),
        (["/lib/deepspeed/comm/torch.py"], True),
        (['/lib/torch/nn/parallel/distributed.py", line 2425 in _sync_buffers'], True),
        (['/lib/torch/nn/parallel/distributed.py", line 1640 in _run_ddp_forward'], False),
        (["/lib/torch/utils/data/dataloader.py"], False),
        ([f"/lib/transformers/{n}.py" for n in range(8)] + ["/lib/torch/distributed/run.py"], False),
    ],
)
def test_the_stack_shows_whether_a_rank_waits_for_others(frames: list[str], waits: bool) -> None:
    other = 'Thread 0x1 (most recent call first):\n  File "/lib/torch/distributed/x.py", line 1 in f\n\n'
    full = (frame if '"' in frame else f'{frame}", line 1 in f' for frame in frames)
    lines = "\n".join(f'  File "{frame}' for frame in full)
    assert hangs._waits(f"{other}Current thread 0x2 (most recent call first):\n{lines}\n") == waits


@pytest.mark.parametrize(
    ("timeout", "step_seconds", "seconds"),
    [
        (None, 0.0, 60.0),
        (None, 0.5, 60.0),
        (None, 30.0, 300.0),
        (4.0, 30.0, 4.0),
        (0.0, 30.0, float("inf")),
    ],
)
def test_how_long_a_rank_may_send_no_heartbeat(
    timeout: float | None, step_seconds: float, seconds: float
) -> None:
    assert limit(Heartbeat(0.0, 1, 1, step_seconds, STEP), timeout) == seconds


@pytest.mark.parametrize(("timeout", "found"), [(None, False), (4.0, True), (0.0, False)])
def test_the_timeout_can_be_set(ranks: Ranks, timeout: float | None, found: bool) -> None:
    pids = ranks.start("itself")
    ranks.beat(0, ago=30.0)
    assert (ranks.find(pids, timeout) is not None) == found


def test_the_folders_of_launchers_that_have_ended_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (
        f"phalanx-heartbeats-{gone.pid}-abc",
        f"phalanx-heartbeats-{os.getppid()}-abc",
        "of-another-program",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-0").write_bytes(b"")
    made = make_heartbeat_folder()
    assert made.parent == tmp_path and list(made.iterdir()) == []
    assert made.name.startswith(f"phalanx-heartbeats-{os.getpid()}-")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [made.name, f"phalanx-heartbeats-{os.getppid()}-abc", "of-another-program"]
    )


def test_two_starts_of_one_process_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = make_heartbeat_folder()
    assert first != make_heartbeat_folder()
    assert first.exists()
