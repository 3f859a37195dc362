"""What makes a folder a checkpoint: a manifest of every file, with size and hash. Light: no torch.

checkpoint-N/manifest.json is written last, into a folder of another name that is then renamed (see
checkpoint/saving.py): a folder checkpoint-N is whole, or something damaged it later, which verify() tells.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
CHECKPOINT_PREFIX = "checkpoint-"
SHARDS = "shards"  # FSDP's folder in a checkpoint
FORMAT = 1
HASH_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Layout:
    """How a run was spread when it wrote a checkpoint, and what one step of it held."""

    backend: str  # none, ddp, fsdp or deepspeed
    zero_stage: int | None
    world_size: int
    batch_size: int
    gradient_accumulation: int

    @property
    def global_batch(self) -> int:
        return self.world_size * self.batch_size * self.gradient_accumulation

    @property
    def batch_in_words(self) -> str:
        parts = f"{self.world_size} ranks x batch_size {self.batch_size}"
        return f"{self.global_batch} ({parts} x gradient_accumulation {self.gradient_accumulation})"

    @property
    def kind(self) -> str:
        """What reads its files: one process and ddp each have all of the state."""
        if self.backend == "deepspeed":
            return f"ZeRO {self.zero_stage}"
        return "ddp" if self.backend == "none" else self.backend

    @property
    def wanted(self) -> str:
        """The keys that ask for it."""
        stage = f" and zero_stage: {self.zero_stage}" if self.zero_stage else ""
        return f"distributed_backend: {self.backend}{stage}"


def misfit(then: Layout, now: Layout) -> str | None:
    """Why a run that is spread as `now` cannot go on from a checkpoint of `then`, and what to do; or None.

    FSDP's shards are read on any number of ranks, and so is what each rank has whole; ZeRO's are not.
    """
    if now.kind != then.kind:
        return (
            f"it was written by {then.kind}, which {now.kind} cannot read. Go on with {then.wanted}, or "
            "begin a run from its weights (phalanx consolidate)."
        )
    if now.world_size == then.world_size:
        return None
    if then.backend == "deepspeed":
        return (
            f"it holds ZeRO's shards of {then.world_size} ranks, which {now.world_size} cannot read. Go on "
            f"with num_processes: {then.world_size}, or begin a run from its weights (phalanx consolidate)."
        )
    if now.global_batch != then.global_batch:
        return (
            f"a step of it held {then.batch_in_words}, and one of this run holds {now.batch_in_words}. "
            "Choose batch_size and gradient_accumulation so that they are the same: data goes on by steps."
        )
    return None


@dataclass(frozen=True)
class FileEntry:
    """One file: its path inside the checkpoint, size in bytes, and XXH3 (128 bits, in hex)."""

    path: str
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    layout: Layout
    position: dict[str, Any]  # in the data: epoch, seed, what was due at this step
    versions: dict[str, str]
    data: str  # fingerprint of the rows that the run was trained on
    files: list[FileEntry] = field(default_factory=list)
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    def write(self, folder: Path) -> None:
        """Writes it to the disk itself: what is renamed afterwards must not be lost with the power."""
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: there is none, or it cannot be read; the message says which.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so its save did not end") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read: {error}") from None
    try:
        if raw["format"] != FORMAT:
            raise ValueError(f"its {MANIFEST} has format {raw['format']}; this version reads {FORMAT}")
        files = [FileEntry(**entry) for entry in raw.pop("files")]
        raw["layout"].pop("shards", None)  # checkpoints of before November 2026 have it; nothing reads it
        return Manifest(**raw | {"layout": Layout(**raw["layout"])}, files=files)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged: {error}") from None


def hash_file(path: Path, sync: bool = False) -> str:
    """XXH3 of a file (128 bits, in hex); with sync, its bytes are on the disk when this returns."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def entry_of(folder: Path, path: Path) -> FileEntry:
    """The entry of a file that was just written."""
    return FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path, sync=True))


def faults(folder: Path, entries: Iterable[FileEntry], content: bool) -> list[str]:
    """What is wrong with these files of a checkpoint: missing, of another size, or of other content."""
    found = []
    for entry in entries:
        path = folder / entry.path
        try:
            size = path.stat().st_size
        except OSError:
            found.append(f"{entry.path} is missing")
            continue
        if size != entry.bytes:
            found.append(f"{entry.path} has {size} bytes instead of {entry.bytes}")
        elif content and (why := _other_content(path, entry)):
            found.append(f"{entry.path} {why}")
    return found


def _other_content(path: Path, entry: FileEntry) -> str | None:
    try:
        return None if hash_file(path) == entry.xxh3 else "has changed since it was written"
    except OSError as error:  # the disk no longer gives it
        return f"cannot be read: {error.strerror}"


def complaint(folder: Path, content: bool) -> str | None:
    """Why a checkpoint cannot be used, in a line; None where it verifies.

    Without `content` the files are not read, only their names and sizes are.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    found = faults(folder, manifest.files, content)
    return _several(found) if found else None


def _several(found: list[str]) -> str:
    return found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} more)"


def step_of(checkpoint: Path | None) -> int:
    """The optimiser step that a checkpoint was written at; 0 for a fresh start."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def checkpoint_folders(folder: Path) -> list[Path]:
    """All folders checkpoint-N of a run, oldest step first, whole or not."""
    found = [
        (int(path.name.removeprefix(CHECKPOINT_PREFIX)), path)
        for path in folder.glob(f"{CHECKPOINT_PREFIX}*")
        if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit() and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def newest_usable(folder: Path, content: bool) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that was passed over."""
    passed: list[str] = []
    for path in reversed(checkpoint_folders(folder)):
        why = complaint(path, content)
        if why is None:
            return path, passed
        passed.append(f"passed over {path}: {why}")
    return None, passed
