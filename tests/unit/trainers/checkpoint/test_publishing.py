"""Which checkpoints are deleted: never the last that verifies, and never the best."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import fake_checkpoint

from trainers.checkpoint.publishing import make_room, publish, rotate
from trainers.storage import manifest, run_files
from trainers.storage.manifest import checkpoint_folders, read_manifest

WEIGHTS = "model.safetensors"
Usage = namedtuple("Usage", ["total", "used", "free"])


def damage(run: Path, step: int) -> None:
    """Change the content, but not the size."""
    path = run / f"checkpoint-{step}" / WEIGHTS
    path.write_bytes(path.read_bytes()[::-1])


def steps(run: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoint_folders(run)]


@pytest.mark.parametrize(("limit", "left"), [(1, [28]), (2, [25, 28]), (3, [20, 25, 28]), (9, [20, 25, 28])])
def test_what_is_damaged_never_takes_the_place_of_what_verifies(
    tmp_path: Path, limit: int, left: list[int]
) -> None:
    """The run resumed from 25, because 30 and 34 are damaged, and 26 is too. 28 was saved just now."""
    for step in (20, 25, 26, 28, 30, 34):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-26" / WEIGHTS).unlink()
    damage(tmp_path, 30)
    damage(tmp_path, 34)
    run_files.begin(tmp_path, of_earlier_version=True)  # they are of this run
    rotate(tmp_path, 28, limit, best="")
    assert steps(tmp_path) == left


def test_a_higher_step_that_verifies_is_not_deleted(tmp_path: Path) -> None:
    for step in (20, 25, 30):
        fake_checkpoint(tmp_path, step)
    run_files.begin(tmp_path, of_earlier_version=True)
    rotate(tmp_path, 25, 1, best="")
    assert steps(tmp_path) == [25, 30]


@pytest.mark.parametrize("best", [5, 10, 20])
def test_the_best_is_kept_in_addition(tmp_path: Path, best: int) -> None:
    for step in (5, 10, 15, 20):
        fake_checkpoint(tmp_path, step)
    run_files.begin(tmp_path, of_earlier_version=True)
    rotate(tmp_path, 20, 1, best=f"checkpoint-{best}")
    assert steps(tmp_path) == sorted({best, 20})


@pytest.mark.parametrize(
    ("needed", "damaged", "left"),
    [
        (10, (), [5, 10, 15, 20]),  # there is room
        (11, (), [5, 15, 20]),
        (12, (), [5, 20]),
        (99, (), [5, 20]),  # the newest and the best stay
        (99, (20,), [5, 15]),
        (99, (15, 20), [5, 10]),
        (99, (5, 10, 15, 20), [5, 10, 15, 20]),  # nothing verifies: a person may still read them
    ],
)
def test_the_oldest_give_way_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, damaged: tuple[int, ...], left: list[int]
) -> None:
    for step in (5, 10, 15, 20):
        fake_checkpoint(tmp_path, step)
    for step in damaged:
        damage(tmp_path, step)
    run_files.begin(tmp_path, of_earlier_version=True)
    # Each checkpoint takes one byte of 14.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(14, 0, 14 - len(steps(tmp_path))))
    deleted = make_room(tmp_path, needed, best="checkpoint-5")
    assert steps(tmp_path) == left
    assert [path.name for path in deleted] == [f"checkpoint-{s}" for s in (5, 10, 15, 20) if s not in left]


def test_with_room_no_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is asked before each save, and a checkpoint may have hundreds of gigabytes."""
    fake_checkpoint(tmp_path, 5)
    monkeypatch.setattr(manifest, "hash_file", lambda *_, **__: pytest.fail("it is read"))
    assert make_room(tmp_path, 1, best="") == []


def test_a_checkpoint_that_the_run_did_not_write_stays(tmp_path: Path) -> None:
    run_files.begin(tmp_path, of_earlier_version=False)
    for step in (5, 10, 15):
        fake_checkpoint(tmp_path, step)
    rotate(tmp_path, 15, 1, best="")
    make_room(tmp_path, 2**62, best="")
    assert steps(tmp_path) == [5, 10, 15]


def test_a_copy_from_another_run_stays_also_under_the_name_of_an_own_checkpoint(tmp_path: Path) -> None:
    run, other = tmp_path / "my-run", tmp_path / "other"
    for step in (5, 10, 15):
        fake_checkpoint(run, step, run_id="mine")
    run_files.begin(run, of_earlier_version=True)
    for step in (5, 15):  # the run saves step 15 again
        shutil.rmtree(run / f"checkpoint-{step}")
        shutil.copytree(fake_checkpoint(other, step, run_id="another"), run / f"checkpoint-{step}")
    part = fake_checkpoint(run / "saving", 15)
    publish(part, replace(read_manifest(part), run="mine"))
    rotate(run, 15, 1, best="")
    make_room(run, 2**62, best="")
    assert [read_manifest(path).run for path in checkpoint_folders(run)] == ["another", "mine"]
    assert read_manifest(run / "checkpoint-15.kept-1").run == "another"
