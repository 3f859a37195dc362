"""Decide what follows a failed attempt: one from the newest checkpoint, one with a smaller batch, or none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from launcher.config import Run
from launcher.plan.batch_search import announce, with_smaller_batch
from launcher.supervise.diagnosis import Failure
from trainers.rank.say import say
from trainers.storage.manifest import checkpoint_folders, newest_usable, step_of
from trainers.storage.run_folder import FINISHED

WITHOUT_PROGRESS = 3  # attempts in a row that made no progress
PAUSES = (0.0, 5.0)  # seconds before the next attempt: after one, and after two without progress


@dataclass
class Restarts:
    """The counts of one start's attempts, and the decision about the next one."""

    folder: Path  # of the run
    count: int = 0  # restarts so far; smaller batches are not counted
    without_progress: int = 0  # attempts in a row without progress
    tried: list[int] = field(default_factory=list)  # batch sizes that ran out of memory
    newest: Path | None = None  # the newest checkpoint that verifies, at the last look
    before: int = 0  # its step when the attempt started

    def begin(self) -> None:
        """Record that an attempt starts."""
        self.before = step_of(self.newest)

    def look(self) -> None:
        """Find the newest checkpoint that verifies. Call it before the first attempt and after each one."""
        self.newest = newest_usable(self.folder, content=False)[0]

    def following(self, run: Run, failure: Failure) -> tuple[Run, float] | None:
        """Return the run of the next attempt and the seconds to wait, or None if it would not help."""
        if failure.of_batches:
            return self._smaller(run, failure)
        self.without_progress = 0 if step_of(self.newest) > self.before else self.without_progress + 1
        if not failure.restart_may_help(run.launch.restart_on_nan):
            return None
        if self.count >= run.launch.max_restarts or self.without_progress >= WITHOUT_PROGRESS:
            return None
        self.count += 1
        begins = self.newest or "the start"
        say(
            "warning",
            f"{failure.line}; restart {self.count} of at most {run.launch.max_restarts}, from {begins}",
        )
        return self.resumed(run), PAUSES[max(self.without_progress - 1, 0)]

    def _smaller(self, run: Run, failure: Failure) -> tuple[Run, float] | None:
        self.tried.append(run.train.batch_size)
        smaller = with_smaller_batch(self.resumed(run)) if run.train.auto_find_batch_size else None
        if smaller is None:
            return None
        say("auto_find_batch_size", announce(run, smaller, failure.rank or 0, self.newest))
        return smaller, 0.0

    def resumed(self, run: Run) -> Run:
        """Return the run that continues from the newest checkpoint, or the same run if there is none.

        If there are checkpoints, but none verifies, the ranks refuse it: a start from the first step would
        replace them.
        """
        trained = bool(checkpoint_folders(self.folder)) or (self.folder / FINISHED).exists()
        return resumed(run) if trained else run


def resumed(run: Run) -> Run:
    """Return the run that continues from its newest checkpoint."""
    return run.changed("a restart", resume=True, overwrite=False)
