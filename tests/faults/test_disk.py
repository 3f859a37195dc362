"""A disk that becomes full during a save, and checkpoints that are damaged later."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trainers.storage.manifest import MANIFEST, newest_usable, read_manifest, why_unusable

MiB = 1 << 20
SLACK = 200_000  # bytes in addition to one checkpoint and the final model: files take full pages


@pytest.fixture
def small_disk(bench, request):
    """small_disk(name, bytes): mount a small file system at that run's folder."""
    mounted: list[Path] = []

    def mount(name: str, size: int) -> Path:
        if os.geteuid() != 0:
            pytest.skip("a tmpfs needs root")
        folder = bench.root / name
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


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
    assert run.code == 2
    assert "project_name: a checkpoint of this run needs about" in run.err
    assert not list((run.folder / "launch").glob("attempt-*"))


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
