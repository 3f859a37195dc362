"""The files that launcher and ranks share: their names, the attempts of a run, and the notes of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from places import REPO

from trainers.rank.protocol import (
    HEARTBEATS,
    AttemptFiles,
    ErrorNote,
    RankFiles,
    StopNote,
    attempt_folder,
    attempts,
    began,
    machine_folder,
    prepared_mark,
    rank_logs,
    read_notes,
    write_note,
)

ERROR = ErrorNote(3, 12.5, 4, "RuntimeError", 'line 1\nline 2 "é"', peer_lost=True)
STOP = StopNote(10, 15, "saved at step 7")


def test_the_files_have_the_names_of_the_documentation(tmp_path: Path) -> None:
    attempt = attempt_folder(tmp_path, 2)
    files, of_rank = AttemptFiles(attempt), RankFiles(attempt, 12)
    paths = {
        "accelerate.yaml": files.accelerate_config,
        "deepspeed.json": files.deepspeed_config,
        "config.json": files.config,
        "command.txt": files.command,
        "launcher.log": files.launcher_log,
        "rank-12.log": of_rank.log,
        "rank-12.pid": of_rank.pid,
        "rank-12.stack": of_rank.stack,
        "rank-12.done": of_rank.done,
        "rank-12.error.json": of_rank.error,
        "rank-12.stopped.json": of_rank.stopped,
        "prepared": prepared_mark(attempt),
        "machine-1": machine_folder(attempt, 1),
    }
    folder = tmp_path / "launch" / "attempt-2"
    assert paths == {name: folder / name for name in paths}
    page = (REPO / "docs" / "architecture.md").read_text()
    for name in paths:
        assert name.replace("rank-12", "rank-N").replace("machine-1", "machine-M") in page


def test_an_attempt_has_the_files_of_its_ranks(tmp_path: Path) -> None:
    assert AttemptFiles(tmp_path).rank(3).log == RankFiles(tmp_path, 3).log


@pytest.mark.parametrize(
    ("end", "by_itself"),
    [
        (lambda files: files.done.touch(), True),
        (lambda files: files.error.touch(), True),
        (lambda files: files.stopped.touch(), True),
        (lambda files: files.log.touch(), False),
    ],
    ids=["done", "error", "stopped", "only-a-log"],
)
def test_a_rank_ended_by_itself_if_it_reported_how(
    tmp_path: Path, end: Callable[[RankFiles], None], by_itself: bool
) -> None:
    end(RankFiles(tmp_path, 1))
    assert RankFiles(tmp_path, 1).ended_by_itself is by_itself
    assert not RankFiles(tmp_path, 10).ended_by_itself


def test_the_process_ids_are_those_that_are_written_so_far(tmp_path: Path) -> None:
    RankFiles(tmp_path, 0).pid.write_text("123")
    RankFiles(tmp_path, 11).pid.write_text("456")
    RankFiles(tmp_path, 2).pid.touch()  # opened, and not written yet
    assert AttemptFiles(tmp_path).pids() == {0: 123, 11: 456}


def test_attempts_are_found_by_their_number(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        attempt_folder(tmp_path, number).mkdir(parents=True)
    (tmp_path / "launch" / "attempt-4").touch()
    (tmp_path / "launch" / "attempt-old").mkdir()
    (tmp_path / "launch" / "machines").mkdir()
    assert sorted(attempts(tmp_path).items()) == [(n, attempt_folder(tmp_path, n)) for n in (1, 2, 10)]


def test_a_run_without_a_launch_has_no_attempts(tmp_path: Path) -> None:
    assert attempts(tmp_path) == {}


def test_an_attempt_has_begun_once_its_command_is_written(tmp_path: Path) -> None:
    assert not began(tmp_path)
    AttemptFiles(tmp_path).config.touch()
    assert not began(tmp_path)
    AttemptFiles(tmp_path).command.touch()
    assert began(tmp_path) and began(tmp_path, machine=0)


def test_on_several_machines_an_attempt_begins_on_each(tmp_path: Path) -> None:
    folder = machine_folder(tmp_path, 10)
    folder.mkdir()
    AttemptFiles(folder).command.touch()
    assert began(tmp_path) and began(tmp_path, machine=10)
    assert not began(tmp_path, machine=0) and not began(tmp_path, machine=1)


@pytest.mark.parametrize("machine", [None, 1])
def test_the_log_of_a_rank_is_in_the_folder_of_its_machine(tmp_path: Path, machine: int | None) -> None:
    folder = tmp_path if machine is None else machine_folder(tmp_path, machine)
    machine_folder(tmp_path, 0).mkdir()
    folder.mkdir(exist_ok=True)
    RankFiles(folder, 1).log.touch()
    assert list(rank_logs(tmp_path, 1)) == [folder / "rank-1.log"]
    assert list(rank_logs(tmp_path, 10)) == []


@pytest.mark.parametrize("note", [ERROR, STOP], ids=["error", "stop"])
def test_a_note_is_read_as_it_was_written(tmp_path: Path, note: ErrorNote | StopNote) -> None:
    write_note(tmp_path, note)
    assert read_notes(tmp_path, type(note)) == [note]


@pytest.mark.parametrize("note", [ERROR, STOP], ids=["error", "stop"])
def test_a_note_for_which_the_disk_has_no_room_is_left_with_the_heartbeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: ErrorNote | StopNote
) -> None:
    """/dev/full is a device without room; the folder of the attempt cannot be made in it either."""
    attempt = Path("/dev/full/attempt-1")
    with pytest.raises(OSError):
        write_note(attempt, note)
    monkeypatch.setenv(HEARTBEATS, str(tmp_path))
    write_note(attempt, note)
    assert AttemptFiles(attempt, tmp_path).notes(type(note)) == [note]
    assert AttemptFiles(attempt).notes(type(note)) == []


def test_notes_of_another_kind_or_machine_are_not_read(tmp_path: Path) -> None:
    write_note(tmp_path, ERROR)
    other = machine_folder(tmp_path, 1)
    other.mkdir()
    write_note(other, STOP)
    assert read_notes(tmp_path, StopNote) == []
    assert read_notes(other, StopNote) == [STOP]


@pytest.mark.parametrize("content", [b"", b'{"rank": 3, "time": 12', b"\0" * 40, b"\xff\xfe{}"])
def test_a_damaged_note_is_skipped(tmp_path: Path, content: bytes) -> None:
    """A rank may be killed while it writes its note, or the disk may be full."""
    RankFiles(tmp_path, 0).error.write_bytes(content)
    write_note(tmp_path, ERROR)
    assert read_notes(tmp_path, ErrorNote) == [ERROR]


@pytest.mark.parametrize("size", range(0, 90, 9))
def test_a_note_that_is_cut_anywhere_is_skipped(tmp_path: Path, size: int) -> None:
    write_note(tmp_path, ERROR)
    path = RankFiles(tmp_path, ERROR.rank).error
    path.write_bytes(path.read_bytes()[:size])
    assert read_notes(tmp_path, ErrorNote) == []
