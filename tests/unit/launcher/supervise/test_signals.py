"""Signals that arrive one after another."""

from __future__ import annotations

import signal

import pytest

from launcher.supervise.signals import Signals


@pytest.mark.parametrize(
    ("numbers", "received", "twice"),
    [
        ((signal.SIGUSR1,), signal.SIGUSR1, False),
        ((signal.SIGUSR1, signal.SIGUSR1), signal.SIGUSR1, False),
        ((signal.SIGUSR1, signal.SIGTERM), signal.SIGTERM, False),
        ((signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM), signal.SIGTERM, True),
        ((signal.SIGINT, signal.SIGTERM), signal.SIGINT, True),
        ((signal.SIGTERM, signal.SIGUSR1), signal.SIGTERM, False),
        ((signal.SIGHUP, signal.SIGHUP), signal.SIGHUP, False),
        ((signal.SIGTERM, signal.SIGHUP), signal.SIGTERM, False),
        ((signal.SIGHUP, signal.SIGTERM, signal.SIGTERM), signal.SIGTERM, True),
    ],
)
def test_one_signal_after_another(numbers: tuple[int, ...], received: int, twice: bool) -> None:
    """After a warning the ranks save. A user who then cancels the job does not interrupt the save.

    The job is not requeued then. A terminal that closes sends SIGHUP twice.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may run these tests
    with Signals() as signals:
        for number in numbers:
            signal.raise_signal(number)
    signal.signal(signal.SIGHUP, before)
    assert (signals.received, signals.twice) == (received, twice)


@pytest.mark.parametrize("running", [True, False])
def test_the_line_of_a_signal_promises_a_save_only_if_ranks_run(
    running: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with Signals() as signals:
        signals.running = running
        signal.raise_signal(signal.SIGTERM)
    expected = "the ranks save at the end of this step, then stop" if running else "the run stops"
    assert capfd.readouterr().err == f"SIGTERM: {expected}\n"
