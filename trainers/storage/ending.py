"""finished.json: that a run is trained and saved, and which of the later actions are done.

A resume of such a run trains nothing. It does what is left: the evaluation on the test split, the merge, the
upload.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainers.rank.say import say
from trainers.storage import run_files
from trainers.storage.run_folder import FINISHED
from trainers.storage.saved_model import check_saved

EVALUATION, MERGE, UPLOAD = "evaluation", "merge", "upload"


@dataclass
class Ending:
    """The state of a run after its last step."""

    step: int
    metrics: dict[str, float]  # the last value of each loss that was logged
    model_step: int  # the step whose weights the model has: the best one, or the last
    done: list[str] = field(default_factory=list)  # EVALUATION, MERGE, UPLOAD

    @property
    def kept(self) -> str:
        """What is safe if the run is stopped now; for the user."""
        return f"trained and saved at step {self.step}"

    def write(self, folder: Path) -> None:
        """Write finished.json."""
        run_files.write(folder, FINISHED, json.dumps(asdict(self), indent=1) + "\n")


def read_ending(folder: Path) -> Ending | None:
    """Return how a run ended. Returns None if it has not, or if its final model does not open any more."""
    try:
        ending = Ending(**json.loads((folder / FINISHED).read_text(encoding="utf-8")))
        check_saved(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        say("warning", f"{folder / FINISHED} is not used: {error}")
        return None
    return ending
