"""The manifest of a checkpoint: every file with its size and hash. Does not import torch.

checkpoint-N/manifest.json is written last, into a folder of another name, which is then renamed (see
checkpoint/saving.py). So a folder checkpoint-N is complete, unless something damaged it later. why_unusable()
finds such damage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from trainers.config.json_text import parse_json
from trainers.config.text import count_of
from trainers.storage.identity import recorded_id

MANIFEST = "manifest.json"
CHECKPOINT_PREFIX = "checkpoint-"
SHARDS = "shards"  # FSDP's folder in a checkpoint
CHECKSUM = "xxh3"  # the key of the manifest's own checksum
FORMAT = 1
HASH_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Layout:
    """How a run was distributed when it wrote a checkpoint, and the size of its steps."""

    backend: str  # none, ddp, fsdp or deepspeed
    zero_stage: int | None
    world_size: int
    batch_size: int
    gradient_accumulation: int

    @property
    def global_batch(self) -> int:
        """The packs (samples if nothing is packed) in a step, over all ranks."""
        return self.world_size * self.batch_size * self.gradient_accumulation

    @property
    def batch_text(self) -> str:
        """The global batch and its factors, as text."""
        parts = f"{count_of(self.world_size, 'rank')} x batch_size {self.batch_size}"
        return f"{self.global_batch} ({parts} x gradient_accumulation {self.gradient_accumulation})"

    @property
    def kind(self) -> str:
        """The format of its files. One process and ddp have the same: each rank has the full state."""
        if self.backend == "deepspeed":
            return f"ZeRO {self.zero_stage}"
        return "ddp" if self.backend == "none" else self.backend

    @property
    def config_keys(self) -> str:
        """The config keys that select this layout."""
        stage = f" and zero_stage: {self.zero_stage}" if self.zero_stage else ""
        return f"distributed_backend: {self.backend}{stage}"


def why_layouts_differ(then: Layout, now: Layout) -> str | None:
    """Return why a run with layout `now` cannot resume from a checkpoint of layout `then`, and what to do.

    Returns None if it can. Any number of ranks can read FSDP's shards, and a state that each rank has in
    full. ZeRO's shards need the same number of ranks.
    """
    if now.kind != then.kind:
        return (
            f"it was written by {then.kind}, which {now.kind} cannot read. Continue with {then.config_keys}, "
            "or start a new run from its weights (phalanx consolidate)."
        )
    if now.world_size == then.world_size:
        return None
    if then.backend == "deepspeed":
        return (
            f"it has the ZeRO shards of {count_of(then.world_size, 'rank')}, but this run has a world size "
            f"of {now.world_size}. Continue with num_processes: {then.world_size}, or start a new run from "
            "its weights (phalanx consolidate)."
        )
    if now.global_batch != then.global_batch:
        return (
            f"its global batch is {then.batch_text}, but that of this run is {now.batch_text}. "
            "Choose batch_size and gradient_accumulation so that both are equal, since the position in the "
            "data is counted in steps."
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
    position: dict[str, Any]  # position in the data: epoch, data seed, and whether an evaluation was due
    versions: dict[str, str]
    data: str  # fingerprint of the rows of the run, and of how they are tokenized
    files: list[FileEntry] = field(default_factory=list)
    format: int = FORMAT
    config: dict[str, Any] | None = None  # the values of the run's config; earlier versions wrote none
    weights: dict[str, str] = field(default_factory=dict)  # key of the base model, and of the reference
    totals: dict[str, float] = field(default_factory=dict)  # sums over the steps (checkpoint/totals.py)
    run: str = ""  # the id of the run that wrote it; earlier versions wrote none

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(entry.bytes for entry in self.files)

    def write(self, folder: Path) -> None:
        """Write the manifest and sync it to the disk: a power failure after the rename must not lose it."""
        content = asdict(self)
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(content | {CHECKSUM: _checksum(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def _checksum(content: dict[str, Any]) -> str:
    """Return the XXH3 of a manifest's values, without its own checksum."""
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        ValueError: the manifest is missing or malformed; the message says which.
    """
    try:
        raw = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so its save did not finish") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read: {error}") from None
    try:
        if raw["format"] != FORMAT:
            raise ValueError(f"its {MANIFEST} has format {raw['format']}; this version reads {FORMAT}")
        checksum = raw.pop(CHECKSUM, None)  # earlier versions wrote none
        if checksum is not None and checksum != _checksum(raw):
            raise ValueError(f"its {MANIFEST} has changed since it was written")
        files = [FileEntry(**entry) for entry in raw.pop("files")]
        raw["layout"].pop("shards", None)  # in checkpoints of earlier versions; nothing reads it
        return Manifest(**raw | {"layout": Layout(**raw["layout"])}, files=files)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged: {error}") from None


def hash_file(path: Path, sync: bool = False) -> str:
    """Return the XXH3 of a file (128 bits, in hex). With `sync`, first sync the file to the disk."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def entry_of(folder: Path, path: Path) -> FileEntry:
    """Return the entry of a file that was just written, and sync the file to the disk."""
    return FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path, sync=True))


def damaged_files(folder: Path, entries: Iterable[FileEntry], content: bool) -> list[str]:
    """Return a line for each file that is missing, or has another size or (with `content`) other content."""
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
    except OSError as error:  # the disk cannot read it any more
        return f"cannot be read: {error.strerror}"


def why_unusable(folder: Path, content: bool) -> str | None:
    """Return why a checkpoint cannot be used, in one line, or None if it verifies.

    Without `content`, check only the names and sizes of the files, and do not read them.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if _is_of_another_run(folder, manifest):
        return "another run wrote it, and it was copied here"
    found = damaged_files(folder, manifest.files, content)
    return _several(found) if found else None


def is_foreign(folder: Path) -> bool:
    """Return whether a checkpoint was copied from another run. Without a manifest it is not known."""
    try:
        return _is_of_another_run(folder, read_manifest(folder))
    except ValueError:
        return False


def _is_of_another_run(folder: Path, manifest: Manifest) -> bool:
    own = recorded_id(folder.absolute().parent)
    return bool(own and manifest.run) and manifest.run != own


def _several(found: list[str]) -> str:
    return found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} more)"


def step_of(checkpoint: Path | None) -> int:
    """Return the optimiser step of a checkpoint, or 0 for None (a start without a checkpoint)."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def is_checkpoint(folder: Path) -> bool:
    """Return whether this is a checkpoint, under any name. It may be damaged."""
    return (folder / MANIFEST).is_file() and "checkpoint-" in folder.name


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return all folders checkpoint-N of a run, lowest step first, whether they verify or not."""
    found = [
        (int(path.name.removeprefix(CHECKPOINT_PREFIX)), path)
        for path in folder.glob(f"{CHECKPOINT_PREFIX}*")
        if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit() and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def newest_usable(folder: Path, content: bool) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a line for each newer one, which is skipped."""
    skipped: list[str] = []
    for path in reversed(checkpoint_folders(folder)):
        why = why_unusable(path, content)
        if why is None:
            return path, skipped
        skipped.append(f"skipped {path}: {why}")
    return None, skipped
