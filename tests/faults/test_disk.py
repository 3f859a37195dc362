"""A disk that becomes full during a save, and checkpoints that are damaged later."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator

import pytest
from planted import fill

from trainers.storage.manifest import MANIFEST, newest_usable, read_manifest, why_unusable

MiB = 1 << 20
SLACK = 200_000  # bytes in addition to one checkpoint and the final model: files take full pages


def used_by_a_run(faults, backend: str) -> tuple[int, int]:
    """Return the bytes of one checkpoint, and of all other files of a run."""
    uninterrupted = faults.uninterrupted(backend).folder
    one = read_manifest(uninterrupted / "checkpoint-12").bytes
    rest = sum(
        p.stat().st_size for p in uninterrupted.rglob("*") if p.is_file() and "checkpoint-" not in str(p)
    )
    return one, rest


@pytest.mark.parametrize(
    "backend", ["fsdp", "zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero3"))]
)
def test_a_full_disk_skips_the_save_and_the_run_continues(faults, small_disk, backend):
    one, rest = used_by_a_run(faults, backend)
    name = f"full-{backend}"
    small_disk(name, one + rest + SLACK)
    # The check before a save is switched off in the ranks, so the disk becomes full while they write.
    run = faults.run(name, backend, what="no-check")
    assert run.code == 0, run.out + run.err
    assert "warning: no checkpoint at step 8: it could not be written: " in run.out
    assert f"Training continues; the newest checkpoint is {name}/checkpoint-4" in run.out
    assert why_unusable(run.folder / "checkpoint-4", content=True) is None
    assert not (run.folder / "checkpoint-8").exists() and not (run.folder / "saving").exists()
    assert (run.folder / "model.safetensors").read_bytes() == (
        faults.uninterrupted(backend).folder / "model.safetensors"
    ).read_bytes()


def test_a_save_without_room_is_skipped_before_anything_is_written(faults, small_disk):
    one, rest = used_by_a_run(faults, "ddp")
    small_disk("tight", one + rest + SLACK)
    run = faults.run("tight", "ddp")
    assert run.code == 0, run.out + run.err
    assert "warning: no checkpoint at step 8: it needs about" in run.out and "MB left" in run.out
    assert why_unusable(run.folder / "checkpoint-4", content=True) is None


def test_too_small_a_disk_is_refused_before_the_ranks_start(faults, small_disk):
    small_disk("tiny", MiB)
    run = faults.run("tiny", "ddp")
    assert run.code == 8
    assert "project_name: a checkpoint of this run needs about" in run.err
    assert not list((run.folder / "launch").glob("attempt-*"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_final_save_on_a_full_disk_keeps_all_and_a_resume_saves_the_model(faults, small_disk, backend):
    name = f"full-end-{backend}"
    folder = small_disk(name, 256 * MiB)
    # One checkpoint, which must not give way.
    run = faults.run(
        *(name, backend, "--save-total-limit", "1"),
        **{"what": "fill", "rank": 0, "phase": "final save", "folder": str(folder), "left": 64 * 1024},
    )
    assert run.code == 8, run.out + run.err
    assert "the final model needs about" in run.err and "continue with --resume" in run.err
    assert "restart 1" not in run.err and not (run.folder / "model.safetensors").exists()
    assert why_unusable(run.folder / "checkpoint-12", content=True) is None
    (folder / "filler").unlink()
    model = faults.uninterrupted(backend).folder / "model.safetensors"
    fill(folder, model.stat().st_size + SLACK)  # no room for another checkpoint
    run = faults.run(name, backend, "--save-total-limit", "1", "--resume")
    assert f"resume: {name}/checkpoint-12" in run.out
    faults.same_end(run, backend)
    (folder / "filler").unlink()
    fill(folder, SLACK)  # nothing is left to do, so no room for a model is needed
    run = faults.run(name, backend, "--save-total-limit", "1", "--resume")
    faults.same_end(run, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2", "zero3"])
def test_an_old_checkpoint_gives_way_to_the_final_model(faults, small_disk, backend):
    name = f"give-way-{backend}"
    folder = small_disk(name, 256 * MiB)
    full = {"what": "fill", "rank": 0, "phase": "final save", "folder": str(folder), "left": 0}
    run = faults.run(name, backend, **full)
    assert "checkpoint-8 was deleted: the disk has no room for the next save" in run.err + run.out
    faults.same_end(run, backend)
    assert why_unusable(run.folder / "checkpoint-12", content=True) is None


@pytest.mark.slow
def test_a_disk_without_a_byte_left_is_named_too(faults, small_disk):
    """Then the rank's note and its log cannot be written either."""
    folder = small_disk("no-byte", 256 * MiB)
    full = {"what": "fill", "rank": 0, "phase": "final save", "folder": str(folder), "left": 0}
    run = faults.run("no-byte", "ddp", "--save-total-limit", "1", **full)
    assert run.code == 8, run.out + run.err
    assert "the final model needs about" in run.err and "restart 1" not in run.err
    (folder / "filler").unlink()
    run = faults.run("no-byte", "ddp", "--save-total-limit", "1", "--resume")
    faults.same_end(run, "ddp")


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """file_limit(bytes): limit the size of the files that this process and its children write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_a_limit_on_the_size_of_a_file_ends_the_run_at_its_first_save(faults, file_limit, backend):
    """torch tells it as a full disk. The kept process takes on the limit of the launcher."""
    checkpoint = faults.uninterrupted(backend).folder / "checkpoint-12"
    largest = max(read_manifest(checkpoint).files, key=lambda entry: entry.bytes)
    file_limit(largest.bytes - 1)
    run = faults.run(f"limited-{backend}", backend)
    assert run.code == 8, run.out + run.err
    assert re.search(
        r"\(disk\): .*saving/checkpoint-4/\S+ would exceed the limit on the size of a file \(ulimit -f\)",
        run.err,
    ), run.err
    assert "restart 1" not in run.err and "unexpected pos" not in run.err and "Traceback" not in run.err


@pytest.mark.slow
@pytest.mark.parametrize("when", [{"step": 6}, {"evaluation": 6}])
def test_a_disk_that_is_full_between_two_saves_costs_no_step(faults, small_disk, when):
    """The values of the step, or of the evaluation, cannot be logged."""
    name, evaluated = f"full-{next(iter(when))}", ("--eval-strategy", "steps", "--eval-steps", "6")
    folder = small_disk(name, 256 * MiB)
    full = {"what": "fill", "rank": 0, "folder": str(folder), "left": 0, **when}
    run = faults.run(name, "ddp", *evaluated, **full)
    assert run.code == 8, run.out + run.err
    assert "(disk): OSError: there is no space left to write" in run.err and "restart 1" not in run.err
    (folder / "filler").unlink()
    run = faults.run(name, "ddp", *evaluated, "--resume")
    assert f"resume: {name}/checkpoint-4" in run.out
    faults.same_end(run, "ddp", *evaluated)


def test_each_kind_of_damage_in_each_file_is_noticed(faults, tmp_path):
    """Truncation, deletion and a flipped bit: the checkpoint before is used."""
    tried = 0
    for backend in ("ddp", "fsdp", "zero2"):
        uninterrupted = faults.uninterrupted(backend).folder
        run = tmp_path / backend
        for name in ("checkpoint-8", "checkpoint-12"):
            shutil.copytree(uninterrupted / name, run / name)
        newest = run / "checkpoint-12"
        assert newest_usable(run, content=True) == (newest, [])
        for folder in (newest, run / "checkpoint-8"):
            state = json.loads((folder / "trainer_state.json").read_text())
            assert read_manifest(folder).position["epoch"] == state["epoch"]
        for entry in read_manifest(newest).files:
            path = newest / entry.path
            content = path.read_bytes()
            flipped = bytearray(content)
            flipped[len(flipped) // 2] ^= 1
            for damaged in (content[:-1], None, bytes(flipped)):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                found, passed = newest_usable(run, content=True)
                assert found == run / "checkpoint-8" and entry.path in passed[0], (entry.path, damaged)
                tried += 1
            path.write_bytes(content)
        (newest / MANIFEST).unlink()
        assert newest_usable(run, content=True)[0] == run / "checkpoint-8"
    assert tried > 60


@pytest.mark.parametrize(
    "backend",
    ["fsdp", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow)],
)
def test_resume_skips_a_damaged_checkpoint_and_says_why(faults, bench, backend):
    uninterrupted = faults.uninterrupted(backend).folder
    name = f"damaged-{backend}"
    folder = bench.root / name
    shutil.copytree(uninterrupted, folder)
    largest = max(read_manifest(folder / "checkpoint-12").files, key=lambda entry: entry.bytes)
    path = folder / "checkpoint-12" / largest.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # the size is right, so only the ranks notice: they read the content
    path.write_bytes(content)
    (folder / "finished.json").unlink()  # as if it was killed in its final save
    run = faults.run(name, backend, "--resume")
    assert f"resume: skipped {name}/checkpoint-12: {largest.path} has changed since it was written" in run.out
    assert f"resume: {name}/checkpoint-8" in run.out
    faults.same_end(run, backend)
    assert why_unusable(folder / "checkpoint-12", content=True) is None  # the run wrote it again
