"""Heartbeats: what a rank writes, and when."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import PATIENCE, wait_for

from launcher.supervise.hangs import HangFinder
from trainers.rank import heartbeat
from trainers.rank.heartbeat import STEP, Heart, Heartbeat, read_heartbeat
from trainers.rank.protocol import HEARTBEATS, AttemptFiles


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
    path.write_bytes(bytes(heartbeat._LAYOUT.size))
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


def test_a_heartbeat_tells_when_the_main_thread_sent_its_last_one(
    heart: Heart, last: Callable[[], Heartbeat]
) -> None:
    heart.start(3)
    first = last().progress
    wait_for(lambda: last().time > first)
    assert last().progress == first, "the thread sends heartbeats without progress"
    heart.beat()
    assert last().progress > first


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
    from trainers.checkpoint.resuming import Resuming

    phases = []
    monkeypatch.setattr(resuming, "heart", Heart())
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: phases.append(resuming.heart.phase))
    trainer = object.__new__(Resuming)
    trainer.state, trainer.is_deepspeed_enabled = SimpleNamespace(best_model_checkpoint="checkpoint-1"), True
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
    assert HangFinder(tmp_path, 60.0, AttemptFiles(tmp_path)).find({3: os.getpid()}) is None
