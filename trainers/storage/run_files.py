"""What a run wrote into its folder: the record of it, and the only way to write there.

The file `.written` in a run's folder lists what the run wrote, one name a line, each before it is written.
A name that ends with / is a folder: all that is in it belongs to the run, and is not listed. --overwrite
removes what is listed, and nothing else. What another program has put in the place of a file that the run
must write is renamed, not replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from trainers.rank import no_links
from trainers.rank.protocol import LAUNCH
from trainers.rank.say import say
from trainers.storage.manifest import CHECKPOINT_PREFIX
from trainers.storage.state_files import read_text

WRITTEN = ".written"
LOCK = ".lock"
MACHINES = f"{LAUNCH}/machines"
JOBS = f"{LAUNCH}/jobs.jsonl"  # oldest first
# These are not listed: they are written before a run has its folder. --overwrite leaves them, because other
# processes use them.
SHARED = (WRITTEN, LOCK, MACHINES, JOBS)
# Folders that a tracker's library writes in.
WANDB, TENSORBOARD = "wandb", "runs"

_WEIGHTS = r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors"
_REMEDY = (
    "Restore it from a copy, or remove it: then the files with the names that every run writes count as "
    "written by this one."
)
_MODEL = rf"{_WEIGHTS}(\.index\.json)?|(adapter_)?config\.json"
_TOKENIZER = (
    r"tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.jinja"
)
_FINAL = rf"{_MODEL}|generation_config\.json|{_TOKENIZER}"
# The names that every run may write. Runs of earlier versions have no record, so these are used instead.
_NAMES = re.compile(
    rf"{_FINAL}|README\.md|run\.json|metrics\.jsonl|tracker\.json|finished\.json"
    r"|trainer_state\.json|training_args\.bin|additional_chat_templates"
    rf"|saving|merged\.part|final\.part|(set-aside-\d+-)?{CHECKPOINT_PREFIX}\d+"
    rf"|not-finite-step-\d+-rank-\d+\.json|{LAUNCH}/(attempt-\d+|progress\.json|warm-\d+\.log)"
)


def is_name_of_run(name: str) -> bool:
    """Return whether a run may write a file of this name (relative to its folder), or a folder above it."""
    parts = name.split("/")
    names = ("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    return any(one in (LAUNCH, WANDB, TENSORBOARD, *SHARED) or _NAMES.fullmatch(one) for one in names)


def is_model(name: str) -> bool:
    """Return whether this is a file of the final model: weights, an adapter, or their config."""
    return re.fullmatch(_MODEL, name) is not None


def has_weights(names: Iterable[str]) -> bool:
    """Return whether one of these files has weights: of a model or of an adapter."""
    return any(re.fullmatch(_WEIGHTS, name) for name in names)


def final_names(folder: Path) -> list[str]:
    """Return the files of a final model and tokenizer, by the names that every run writes.

    A name that the record does not list is not of the run, unless the record is gone or has no weights.
    """
    files = (path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    names = sorted(path.name for path in files if re.fullmatch(_FINAL, path.name))
    owned = [name for name in names if owns(folder, name)]
    return owned if has_weights(owned) else names


def recorded(folder: Path) -> list[str] | None:
    """Return the names that the run's record lists, or None if there is no record.

    Raises:
        ConfigError: the record cannot be read.
    """
    path = folder / WRITTEN
    if path.is_symlink():
        raise no_links.LinkFound(path)
    if not folder.is_dir():  # a file has no record either
        return None
    try:
        return [line for line in read_text(path, _REMEDY).splitlines() if is_inside(line)]
    except FileNotFoundError:
        return None


def is_inside(line: str) -> bool:
    """Return whether this is the name of something in a run's folder, and does not lead out of it."""
    return bool(line) and not {"", ".", ".."} & set(line.removesuffix("/").split("/"))


def entries(folder: Path) -> list[str]:
    """Return what is directly in a run's folder and in its launch/ (but not launch itself), by name."""
    if not folder.is_dir():
        return []
    launch = folder / LAUNCH
    below = [f"{LAUNCH}/{name}" for name in os.listdir(launch)] if _is_folder(launch) else []
    return sorted([name for name in os.listdir(folder) if name != LAUNCH or not _is_folder(launch)] + below)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def foreign(folder: Path) -> list[str]:
    """Return the entries that no run of ours wrote."""
    listed = recorded(folder) or []
    parts = [no_links.part_of(name) for name in (*listed, *SHARED)]
    return [name for name in entries(folder) if not _covers([*listed, *SHARED, *parts], name)]


def _covers(listed: list[str], name: str) -> bool:
    plain = name.removesuffix("/")
    return any(plain == one.removesuffix("/") or (one[-1] == "/" and plain.startswith(one)) for one in listed)


def begin(folder: Path, of_earlier_version: bool) -> None:
    """Begin the record, unless there is one. For a run of an earlier version, use the names of all runs."""
    if recorded(folder) is None:
        found = [name for name in entries(folder) if of_earlier_version and _NAMES.fullmatch(name)]
        lines = [f"{name}/\n" if _is_folder(folder / name) else f"{name}\n" for name in found]
        no_links.write(folder, folder / WRITTEN, "".join(lines))


def clear(folder: Path) -> list[str]:
    """Remove what the record lists, and return the names of what is left because no run wrote it."""
    for name in recorded(folder) or []:
        if name not in SHARED:
            no_links.remove(folder, folder / name)
            no_links.remove(folder, folder / no_links.part_of(name))
    no_links.write(folder, folder / WRITTEN, "")
    return foreign(folder)


def owns(folder: Path, name: str) -> bool:
    """Return whether the record lists a name, or the folder that it is in."""
    return _covers(recorded(folder) or [], name)


def own(folder: Path, name: str) -> None:
    """List a name (of a folder: with / at its end) before it is written.

    What is there, but is not listed, is not of this run: it gets another name.
    """
    if owns(folder, name):
        return
    path = folder / name
    if "/" not in name.removesuffix("/") and os.path.lexists(path):
        keep(folder, path.name)
    with no_links.naming(folder / WRITTEN), no_links.open_file(folder, folder / WRITTEN, "a") as file:
        file.write(f"{name}\n")


def keep(folder: Path, name: str) -> None:
    """Give another name to what is not of this run, in the place of something that the run writes."""
    path = folder / name
    kept = next(p for n in count(1) if not os.path.lexists(p := folder / f"{name}.kept-{n}"))
    no_links.rename(folder, path, kept)
    say("note", f"{path} is not of this run, which writes there now; it is kept as {kept.name}")


def write(folder: Path, name: str, text: str) -> None:
    """Write a file of the run atomically. A link of this name is replaced."""
    own(folder, name)
    no_links.write(folder, folder / name, text)


def append(folder: Path, name: str, text: str) -> None:
    """Append to a file of the run. It is created if it is missing.

    Raises:
        LinkFound: it is a link.
    """
    own(folder, name)
    with no_links.naming(folder / name), no_links.open_file(folder, folder / name, "a") as file:
        file.write(text)


def make_folder(folder: Path, name: str) -> Path:
    """Create a folder of the run, unless it exists, and return it.

    Raises:
        LinkFound: it is a link.
    """
    own(folder, f"{name}/")
    return no_links.make_folder(folder, folder / name)


def fresh_folder(folder: Path, name: str) -> Path:
    """Create an empty folder of the run, and return it. Libraries write only into such folders."""
    own(folder, f"{name}/")
    no_links.remove(folder, folder / name)
    return no_links.make_folder(folder, folder / name)


def rename(folder: Path, name: str, target: str) -> None:
    """Rename a folder of the run."""
    own(folder, f"{target}/")
    no_links.rename(folder, folder / name, folder / target)


def remove(folder: Path, name: str) -> None:
    """Remove a file, a folder or a link of the run, if it exists."""
    no_links.remove(folder, folder / name)


def move_in(folder: Path, part: str) -> None:
    """Move all that is in a folder of the run up into the run's folder, and remove the empty folder."""
    no_links.follow_umask(folder / part)
    for path in sorted((folder / part).iterdir()):
        is_folder = _is_folder(path)
        own(folder, f"{path.name}/" if is_folder else path.name)
        if is_folder:
            no_links.remove(folder, folder / path.name)
        no_links.rename(folder, path, folder / path.name)
    no_links.remove(folder, folder / part)


def remove_model(folder: Path) -> None:
    """Remove the final model of an earlier start: an adapter or a full model."""
    for name in recorded(folder) or []:
        if is_model(name):
            no_links.remove(folder, folder / name)
