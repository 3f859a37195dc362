"""What the launcher knows of the ranks while it watches them."""

from __future__ import annotations

from pathlib import Path

import pytest
from messages import GLOO

from launcher.supervise.signals import Signals
from launcher.supervise.watcher import Watcher
from trainers.rank import process
from trainers.rank.failures import code_of
from trainers.rank.protocol import AttemptFiles


class Ranks:
    """Two ranks: both run, then one has failed and the other waits for it, then both have ended."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.seen: list[bool] = []  # whether a save was possible, at each look
        self.left = [{0: 1, 1: 2}, {0: 1, 1: 2}, {1: 2}, {1: 2}, {}]
        self.failed = False

    def ranks(self) -> dict[int, int]:
        return self.left[0]

    def wait(self, seconds: float) -> int | None:
        self.seen.append(self.signals.running)
        self.left.pop(0)
        return None if self.left[0] else 1

    def exits(self) -> dict[int, int]:
        return {0: -9} if len(self.left[0]) == 1 else {}

    def kill(self) -> None:
        self.failed = True


def test_ranks_can_save_only_while_all_of_them_run(tmp_path: Path) -> None:
    """A signal that comes later is answered otherwise: nobody is left who saves."""
    signals = Signals()
    launch = Ranks(signals)
    watcher = Watcher(AttemptFiles(tmp_path), tmp_path, 0, 0, signals)
    watcher.follow(launch)
    assert launch.seen == [False, True, False, False] and not signals.running and launch.failed


@pytest.mark.parametrize(
    ("error", "shown"), [(RuntimeError(GLOO), "step 3\n"), (TypeError("own"), "step 3\nTraceback\n")]
)
def test_the_traceback_of_a_rank_that_only_lost_a_peer_stays_in_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: Exception, shown: str
) -> None:
    """It would be printed before the cause, which is in another rank."""
    files = AttemptFiles(tmp_path)
    log = files.rank(0).log
    log.write_text("step 3\n")
    process._note(tmp_path, error, code_of(error))
    with log.open("a") as file:
        file.write("Traceback\n")
    Watcher(files, tmp_path, 0, 0, Signals()).follow(Ranks(Signals()))
    assert capfd.readouterr().out == shown
