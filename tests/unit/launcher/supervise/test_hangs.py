"""Which rank hangs, how long a rank may send no heartbeat, and the folder of the heartbeats."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_for

from launcher.supervise import hangs
from launcher.supervise.hangs import HangFinder, idle_limit, limit, make_heartbeat_folder
from trainers.rank import heartbeat
from trainers.rank.heartbeat import STEP, Heart, Heartbeat
from trainers.rank.protocol import AttemptFiles

# A rank, as far as the watcher sees it. It writes its stack on the signal, and waits: for others (in a frame
# of torch.distributed), or by itself (in a frame of transformers).
RANK = """
import sys, threading, time
from pathlib import Path
from trainers.rank.process import _dump_stack_on_signal

_dump_stack_on_signal(Path(sys.argv[1]).parent, Path(sys.argv[1]))
code = "import time\\ndef stay():\\n    print('here', flush=True)\\n    time.sleep(600)\\n"
files = {"others": "/lib/torch/distributed/distributed_c10d.py", "itself": "/lib/transformers/trainer.py",
         "lock": "/lib/filelock/_api.py"}
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


# A rank in a library: it sends no heartbeat of its main thread, and works in one of these ways, or waits.
BUSY_RANK = """
import os, subprocess, sys, time
from pathlib import Path
from trainers.rank.outliving import die_with_parent
from trainers.rank.process import _dump_stack_on_signal

_dump_stack_on_signal(Path(sys.argv[1]).parent, Path(sys.argv[1]))

def waits():
    reader, writer = os.pipe()
    print("here", flush=True)
    os.read(reader, 1)

def computes():
    print("here", flush=True)
    while True:
        pass

def writes():
    with open("/dev/null", "wb", buffering=0) as file:
        print("here", flush=True)
        while file.write(bytes(1 << 20)):
            time.sleep(0.02)

def reads():
    with open("/dev/zero", "rb", buffering=0) as file:
        print("here", flush=True)
        while file.read(1 << 20):
            time.sleep(0.02)

def compiles():
    argv = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(argv, process_group=0, preexec_fn=die_with_parent) as compiler:
        print("here", flush=True)
        compiler.wait()

globals()[sys.argv[2]]()
"""


class Ranks:
    """Processes that stand for ranks, and the heartbeats that a test writes for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *where: str, script: str = RANK) -> dict[int, int]:
        """Start one rank for each place, and return rank -> pid."""
        for rank, place in enumerate(where, start=len(self.started)):
            argv = [sys.executable, "-c", script, str(self.folder / f"rank-{rank}.stack"), place]
            self.started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        for process in self.started[-len(where) :]:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        return {rank: process.pid for rank, process in enumerate(self.started)}

    def beat(
        self, rank: int, ago: float = 100.0, count: int = 50, step: int = 6, phase: str = STEP,
        progressed: float | None = None,
    ) -> None:  # fmt: skip
        """Write the last heartbeat of a rank, `ago` seconds ago; its main thread's was `progressed` ago."""
        now = time.monotonic()
        when, main = now - ago, now - (ago if progressed is None else progressed)
        raw = heartbeat._LAYOUT.pack(when, count, step, 0.5, phase.encode(), main)
        (self.folder / f"rank-{rank}").write_bytes(raw)

    def find(self, pids: dict[int, int], timeout: float | None = None) -> hangs.Hang | None:
        return self.finder(timeout).find(pids)

    def finder(self, timeout: float | None = None) -> HangFinder:
        return HangFinder(self.folder, timeout, AttemptFiles(self.folder))

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
    assert ranks.finder().find(pids, awake) is None
    for _ in range(10):
        now += hangs.SHORTEST / 5
        assert wakefulness.look() == awake, "short intervals between two looks are not a pause"
    hang = ranks.finder().find(pids, awake)
    assert hang is not None and hang.rank == 1


@pytest.mark.parametrize(
    ("timeout", "pause", "slept"),
    [
        (None, 21.0, True),
        (None, 19.0, False),
        (0.0, 19.0, False),
        (30.0, 16.0, True),
        (30.0, 14.0, False),
        (4.0, 4.0, True),
    ],
)
def test_a_pause_in_which_ranks_would_count_as_hung_is_one_of_this_process_too(
    monkeypatch: pytest.MonkeyPatch, timeout: float | None, pause: float, slept: bool
) -> None:
    wakefulness = hangs.SuspensionDetector(timeout)
    before = wakefulness.since
    monkeypatch.setattr(time, "monotonic", lambda: before + pause)
    assert (wakefulness.look() > before) == slept


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


def test_the_rank_that_the_others_wait_for_is_named_before_its_own_time_is_up(ranks: Ranks) -> None:
    pids = ranks.start("others", "itself", "itself")
    ranks.beat(0, ago=61.0)
    ranks.beat(1, ago=59.0, count=51)
    ranks.beat(2, ago=1.0, count=40)  # this one still works
    assert ranks.named(pids) == 1


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
        heart.file = memoryview(bytearray(heartbeat._LAYOUT.size))  # type: ignore[assignment]
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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that does not work hangs after two looks, instead of after minutes."""
    monkeypatch.setattr(hangs, "INTERVAL", 0.25)
    monkeypatch.setattr(hangs, "IDLE", 0.75)


class Living:
    """Ranks whose heartbeats are sent by their threads. `find()` is one look of the launcher."""

    def __init__(self, ranks: Ranks, pids: dict[int, int], alone: bool = True) -> None:
        self.ranks, self.pids = ranks, pids
        self.finder = HangFinder(ranks.folder, None, AttemptFiles(ranks.folder), alone)

    def find(self, phase: str = "save") -> hangs.Hang | None:
        for rank in self.pids:
            self.ranks.beat(rank, ago=0.0, phase=phase, progressed=100.0)
        return self.finder.find(self.pids)

    def first(self) -> hangs.Hang:
        found: list[hangs.Hang] = []
        wait_for(lambda: bool(found.extend(filter(None, [self.find()])) or found))
        return found[0]

    def never(self, looks: int) -> bool:
        """Whether nothing hangs while each rank is measured so many times."""
        seen: set[float] = set()
        while len(seen) < looks:
            if self.find() is not None:
                return False
            seen.add(self.finder.progress.looked)
            time.sleep(0.05)
        return True


@pytest.mark.parametrize("where", ["itself", "others"])
def test_a_rank_that_is_stopped_outside_a_step_is_named_so(ranks: Ranks, impatient: None, where: str) -> None:
    """Also where it waited for the other."""
    pids = ranks.start(where, "itself")
    os.kill(pids[0], signal.SIGSTOP)
    wait_for(lambda: hangs._is_stopped(pids[0]))
    hang = Living(ranks, pids).first()
    assert (hang.rank, hang.stopped) == (0, True)
    assert hang.reason.startswith("stopped (SIGSTOP, or a debugger): no progress for ")


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_waits_inside_a_library_is_named_with_its_stack(ranks: Ranks) -> None:
    """Its thread still sends heartbeats."""
    hang = Living(ranks, ranks.start("waits", "computes", script=BUSY_RANK)).first()
    assert (hang.rank, hang.stopped, hang.idle) == (0, False, True)
    assert "in waits" in hang.stack
    assert hang.reason.startswith("hung: no progress for ")
    assert hang.reason.endswith(
        " s (it computed, read and wrote almost nothing), in phase 'save' after step 6"
    )


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("work", ["computes", "writes", "reads", "compiles"])
def test_a_rank_that_works_in_a_library_does_not_hang(ranks: Ranks, work: str) -> None:
    assert Living(ranks, ranks.start(work, script=BUSY_RANK)).never(looks=5)


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_waits_for_one_that_works_does_not_hang(ranks: Ranks) -> None:
    pids = ranks.start("others")
    pids |= {1: ranks.start("computes", script=BUSY_RANK)[1]}
    assert Living(ranks, pids).never(looks=5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("alone", [True, False])
def test_if_all_ranks_wait_for_each_other_they_hang_unless_another_machine_may_work(
    ranks: Ranks, alone: bool
) -> None:
    living = Living(ranks, ranks.start("others", "others"), alone)
    assert living.first().rank == 0 if alone else living.never(looks=5)


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_waits_for_the_lock_of_a_living_process_does_not_hang(ranks: Ranks) -> None:
    assert Living(ranks, ranks.start("lock")).never(looks=5)


@pytest.mark.usefixtures("impatient")
def test_work_is_no_progress_in_a_step(ranks: Ranks) -> None:
    """There each micro-batch sends a heartbeat."""
    pids = ranks.start("computes", script=BUSY_RANK)
    ranks.beat(0, ago=100.0)
    assert ranks.named(pids) == 0


@pytest.mark.usefixtures("impatient")
def test_a_library_that_works_with_the_interpreter_blocked_is_no_hang(ranks: Ranks) -> None:
    """Then not even the thread can send heartbeats."""
    finder, pids = ranks.finder(), ranks.start("computes", script=BUSY_RANK)
    ranks.beat(0, ago=100.0, phase="load")
    assert finder.find(pids) is None


@pytest.mark.parametrize(
    ("written", "timeout", "seconds"),
    [(0, None, 600.0), (40 * 10**9, None, 2600.0), (40 * 10**9, 7.0, 7.0), (0, 0.0, float("inf"))],
)
def test_how_long_a_rank_may_not_work(written: int, timeout: float | None, seconds: float) -> None:
    assert idle_limit(written, timeout) == seconds


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
