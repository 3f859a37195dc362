"""Signals to a rank: which it handles, and what its workers do."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from trainers.rank.signals import SIGNALS, heard

# A rank, whose process group gets a signal, with a worker as a data loader has one.
RANK = """
import multiprocessing, os, signal, sys, time
from trainers.rank.signals import stop

def work(rows):
    for row in range(100):
        rows.put(row)
        time.sleep(0.01)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may run these tests
os.setpgid(0, 0)
stop.listen()
stop.training()
context = multiprocessing.get_context("fork")
rows = context.Queue()
worker = context.Process(target=work, args=(rows,))
worker.start()
rows.get()
os.killpg(0, int(sys.argv[1]))
found = [rows.get(timeout=10) for _ in range(20)]
assert stop.requested == int(sys.argv[1])
worker.terminate()
worker.join()
print(len(found), worker.exitcode)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_worker_goes_on_after_a_signal_to_all_processes(number: signal.Signals) -> None:
    """The rank saves after the step, for which it needs the worker's batch."""
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(int(number))], text=True, capture_output=True, check=False
    )
    assert done.stdout == f"20 {-signal.SIGTERM}\n", done.stderr


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_hang_up_that_nohup_ignores_stays_ignored(handler: signal.Handlers) -> None:
    assert signal.SIGHUP in SIGNALS
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert (signal.SIGHUP in heard()) == (handler == signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
