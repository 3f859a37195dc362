"""The manifest of a checkpoint: what is damage, which checkpoint is used, which runs can read it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_checkpoint

from trainers.storage import manifest
from trainers.storage.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Layout,
    Manifest,
    checkpoint_folders,
    entry_of,
    newest_usable,
    read_manifest,
    step_of,
    why_layouts_differ,
    why_unusable,
)

DDP = Layout("ddp", None, 2, batch_size=2, gradient_accumulation=4)
FSDP = replace(DDP, backend="fsdp")
ZERO2 = replace(DDP, backend="deepspeed", zero_stage=2)
ONE = replace(DDP, backend="none", world_size=1, gradient_accumulation=8)
WEIGHTS, STATE = "model.safetensors", "trainer_state.json"


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Manifest(
        step=7,
        layout=replace(ZERO2, world_size=8),
        position={"epoch": 1.25, "data_seed": 42, "evaluation_due": True},
        versions={"torch": "2.10.0"},
        data="abc",
        files=[FileEntry("shards/__0_0.distcp", 12, "0" * 32), FileEntry("é.json", 0, "f" * 32)],
    )
    written.write(tmp_path)
    assert read_manifest(tmp_path) == written
    assert written.bytes == 12


def test_an_entry_has_the_path_the_size_and_the_hash(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "a"
    path.write_bytes(b"")
    # XXH3 of an empty file.
    assert entry_of(tmp_path, path) == FileEntry("shards/a", 0, "99aa06d3014798d86001c324468d497f")


def test_a_file_longer_than_a_block_is_hashed_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(os.urandom(1000))
    whole = manifest.hash_file(path)
    monkeypatch.setattr(manifest, "HASH_BLOCK", 64)
    assert manifest.hash_file(path) == whole


@pytest.mark.parametrize("content", [False, True])
def test_a_complete_checkpoint_verifies(checkpoint: Path, content: bool) -> None:
    assert why_unusable(checkpoint, content) is None


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def rewrite(checkpoint: Path, **changes: Any) -> None:
    """Change values in the manifest, as if it were written so by a version without a checksum."""
    raw = json.loads((checkpoint / MANIFEST).read_text())
    del raw["xxh3"]
    (checkpoint / MANIFEST).write_text(json.dumps({**raw, **changes}))


def lose_both(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / STATE).unlink()


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda c: (c / MANIFEST).unlink(), "it has no manifest.json, so its save did not finish"),
        (lambda c: cut(c / MANIFEST, 40), "its manifest.json cannot be read: "),
        (lambda c: (c / MANIFEST).write_bytes(b"\xff\xfe"), "its manifest.json cannot be read: "),
        (lambda c: cut(c / MANIFEST, 0), "its manifest.json cannot be read: "),
        (lambda c: (c / MANIFEST).write_text("{}"), "its manifest.json is damaged: 'format'"),
        (lambda c: (c / MANIFEST).write_text("[]"), "its manifest.json is damaged: "),
        (lambda c: rewrite(c, files=[{"path": WEIGHTS}]), "its manifest.json is damaged: "),
        (lambda c: rewrite(c, files=None), "its manifest.json is damaged: "),
        (lambda c: rewrite(c, layout={"backend": "ddp"}), "its manifest.json is damaged: "),
        (
            lambda c: rewrite(c, format=FORMAT + 1),
            f"its manifest.json has format {FORMAT + 1}; this version reads {FORMAT}",
        ),
        (lambda c: (c / WEIGHTS).unlink(), "model.safetensors is missing"),
        (lambda c: cut(c / WEIGHTS, 3), "model.safetensors has 3 bytes instead of 11"),
        (lambda c: (c / WEIGHTS).write_bytes(b"the weights, longer"), "model.safetensors has 19 bytes"),
        (lose_both, "model.safetensors is missing (and 1 more)"),
    ],
)
def test_damage_is_reported(
    checkpoint: Path, damage: Callable[[Path], Any], expected: str, content: bool
) -> None:
    damage(checkpoint)
    found = why_unusable(checkpoint, content)
    assert str(found).startswith(expected)
    assert len(str(found).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "other"),
    [('"step": 5', '"step": 6'), ('"world_size": 2', '"world_size": 4'), ('"bytes": 11', '"bytes": 12'),
     ('"the rows"', '"other rows"'), ('"data_seed": 42', '"data_seed": 43')],
)  # fmt: skip
def test_a_changed_value_of_the_manifest_is_damage(checkpoint: Path, value: str, other: str) -> None:
    text = (checkpoint / MANIFEST).read_text()
    assert value in text
    (checkpoint / MANIFEST).write_text(text.replace(value, other))
    assert why_unusable(checkpoint, content=False) == "its manifest.json has changed since it was written"


def test_a_flipped_bit_is_found_only_if_the_content_is_read(checkpoint: Path) -> None:
    raw = bytearray((checkpoint / WEIGHTS).read_bytes())
    raw[4] ^= 1
    (checkpoint / WEIGHTS).write_bytes(raw)
    assert why_unusable(checkpoint, content=False) is None
    assert why_unusable(checkpoint, content=True) == "model.safetensors has changed since it was written"


def test_a_file_that_the_disk_cannot_read_is_damage(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path, sync: bool = False) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(manifest, "hash_file", unreadable)
    assert "model.safetensors" in str(why_unusable(checkpoint, content=True))


def test_an_additional_file_is_allowed(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("mine")
    assert why_unusable(checkpoint, content=True) is None


def test_checkpoints_are_listed_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "saving/checkpoint-11", "checkpoint-5-model",
                 "set-aside-1-checkpoint-12", "checkpoint-", "checkpoint-x"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoint-13").write_text("a file")
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_the_name_of_a_checkpoint_has_its_step(tmp_path: Path) -> None:
    assert step_of(tmp_path / "checkpoint-12") == 12
    assert step_of(None) == 0


def test_the_newest_that_verifies_is_used_and_newer_ones_are_reported(tmp_path: Path) -> None:
    for step in (2, 4, 10, 20):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-20" / MANIFEST).unlink()
    (tmp_path / "checkpoint-10" / WEIGHTS).unlink()
    (tmp_path / "checkpoint-2" / WEIGHTS).unlink()  # older, so it is not checked
    assert newest_usable(tmp_path, content=True) == (
        tmp_path / "checkpoint-4",
        [
            f"skipped {tmp_path}/checkpoint-20: it has no manifest.json, so its save did not finish",
            f"skipped {tmp_path}/checkpoint-10: model.safetensors is missing",
        ],
    )


def test_a_checkpoint_with_changed_content_is_skipped_if_the_content_is_read(tmp_path: Path) -> None:
    for step in (4, 10):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-10" / WEIGHTS).write_bytes(b"THE WEIGHTS")
    assert newest_usable(tmp_path, content=False) == (tmp_path / "checkpoint-10", [])
    found, skipped = newest_usable(tmp_path, content=True)
    assert found == tmp_path / "checkpoint-4" and len(skipped) == 1


def test_if_no_checkpoint_verifies_the_result_is_none(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    found, skipped = newest_usable(checkpoint.parent, content=True)
    assert found is None and len(skipped) == 1


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (DDP, DDP, None),
        (DDP, ONE, None),  # each rank has the full state, and the global batch is the same
        (ONE, DDP, None),
        (FSDP, replace(FSDP, world_size=4, gradient_accumulation=2), None),
        (FSDP, replace(FSDP, world_size=1, gradient_accumulation=8), None),
        (ZERO2, ZERO2, None),
        (DDP, FSDP, "it was written by ddp, which fsdp cannot read. Continue with distributed_backend: ddp, "
                    "or start a new run from its weights (phalanx consolidate)."),
        (ONE, FSDP,
         "it was written by ddp, which fsdp cannot read. Continue with distributed_backend: none,"),
        (FSDP, DDP,
         "it was written by fsdp, which ddp cannot read. Continue with distributed_backend: fsdp,"),
        (FSDP, ZERO2, "it was written by fsdp, which ZeRO 2 cannot read."),
        (ZERO2, replace(ZERO2, zero_stage=3),
         "it was written by ZeRO 2, which ZeRO 3 cannot read. Continue with distributed_backend: deepspeed "
         "and zero_stage: 2, or start"),
        (ZERO2, replace(ZERO2, world_size=4, gradient_accumulation=2),
         "it has the ZeRO shards of 2 ranks, but this run has a world size of 4. Continue with "
         "num_processes: 2, or start"),
        (DDP, replace(DDP, world_size=3),
         "its global batch is 16 (2 ranks x batch_size 2 x gradient_accumulation 4), but that of this run is "
         "24 (3 ranks x batch_size 2 x gradient_accumulation 4). Choose batch_size and gradient_acc"),
        (FSDP, replace(FSDP, world_size=4), "its global batch is 16 (2 ranks x "),
    ],
)  # fmt: skip
def test_which_layouts_can_resume_from_which(then: Layout, now: Layout, expected: str | None) -> None:
    why = why_layouts_differ(then, now)
    assert why is None if expected is None else str(why).startswith(expected)
