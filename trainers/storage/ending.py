"""finished.json: that a run is trained and saved, its final files, and which later actions are done.

A resume of such a run trains nothing. It does what is left: the evaluation on the test split, the merge, the
upload. Each final file has its size and hash, as in the manifest of a checkpoint. They are verified before
the model is used again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.storage import run_files
from trainers.storage.manifest import FileEntry, checkpoint_folders, damaged_files, step_of, why_unusable
from trainers.storage.run_folder import FINISHED
from trainers.storage.saved_model import check_saved
from trainers.storage.state_files import damaged, read_object

EVALUATION, MERGE, UPLOAD = "evaluation", "merge", "upload"
REMEDY = (
    "Restore it from a copy, or remove it: then --resume saves the model again, from the newest checkpoint."
)


@dataclass
class Ending:
    """The state of a run after its last step."""

    step: int
    metrics: dict[str, float]  # the last value of each loss that was logged
    model_step: int  # the step whose weights the model has: the best one, or the last
    done: list[str] = field(default_factory=list)  # EVALUATION, MERGE, UPLOAD
    files: list[FileEntry] = field(default_factory=list)  # the final model; earlier versions listed none

    @property
    def kept(self) -> str:
        """What is safe if the run is stopped now; for the user."""
        return f"trained and saved at step {self.step}"

    def names(self, folder: Path) -> list[str]:
        """Return the files of the final model and tokenizer. What else is in the folder is not of the run."""
        return [entry.path for entry in self.files] or run_files.final_names(folder)

    def replace(self, removed: Iterable[str], added: list[FileEntry]) -> None:
        """Update the list of files after some were removed and others written."""
        gone = {*removed, *(entry.path for entry in added)}
        self.files = sorted([e for e in self.files if e.path not in gone] + added, key=lambda e: e.path)

    def why_damaged(self, folder: Path, content: bool = True) -> str | None:
        """Return which final file is missing or changed, in one line, or None if all verify.

        Without `content`, the files are not read to their end.
        """
        found = damaged_files(folder, self.files, content)
        if found:
            return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
        try:
            check_saved(folder, self.names(folder))
        except RuntimeError as error:
            return str(error).rstrip(".")
        return None

    def write(self, folder: Path) -> None:
        """Write finished.json."""
        run_files.write(folder, FINISHED, json.dumps(asdict(self), indent=1) + "\n")


def read_ending(folder: Path) -> Ending | None:
    """Return how a run ended, or None if it has not. Its files are not verified: see why_damaged().

    Raises:
        ConfigError: finished.json is damaged.
    """
    path = folder / FINISHED
    try:
        values = read_object(path, REMEDY)
    except FileNotFoundError:
        return None
    try:
        files = [FileEntry(**entry) for entry in values.pop("files", [])]
        ending = Ending(**values, files=files)
    except TypeError as error:
        raise damaged(path, f"it has other keys ({error})", REMEDY) from None
    for name, right in (
        ("step", isinstance(ending.step, int)),
        ("model_step", isinstance(ending.model_step, int)),
        ("metrics", _numbers(ending.metrics)),
        ("done", isinstance(ending.done, list) and all(isinstance(one, str) for one in ending.done)),
        ("files", all(_is_entry(entry) for entry in files)),
    ):
        if not right:
            raise damaged(path, f"{name} has another type", REMEDY)
    return ending


def _numbers(metrics: object) -> bool:
    return isinstance(metrics, dict) and all(isinstance(value, (int, float)) for value in metrics.values())


def _is_entry(entry: FileEntry) -> bool:
    typed = isinstance(entry.path, str) and isinstance(entry.bytes, int) and isinstance(entry.xxh3, str)
    return typed and run_files.is_inside(entry.path)


def good_copy(folder: Path, ending: Ending) -> Path | None:
    """Return the checkpoint from which a resume saves the final model again: it is of the last step."""
    for path in checkpoint_folders(folder):
        if step_of(path) == ending.step and why_unusable(path, content=True) is None:
            return path
    return None


def damaged_model(folder: Path, ending: Ending, why: str) -> ConfigError:
    """Return the error for a final model that cannot be used and cannot be made again without training."""
    return ConfigError(
        f"{folder}: the final model is damaged: {why}. Restore the file from a copy. Or train the rest again "
        f"from the newest checkpoint: remove {folder / FINISHED}, then start with --resume."
    )
