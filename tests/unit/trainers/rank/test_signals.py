"""Signals to a rank: which it handles, and what its workers do."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from trainers.rank.signals import SIGNALS, heard

# A rank, whose process group gets a signal, with a worker of a data loader.
RANK = """
import multiprocessing, os, signal, sys, time
from torch.utils.data import DataLoader, _utils
from trainers.rank.data_workers import keep_workers
from trainers.rank.signals import stop

class Rows:
    def __len__(self):
        return 100

    def __getitem__(self, row):
        while row == hangs_at:
            hanging.set()
            time.sleep(1)
        time.sleep(0.01)
        return row

hangs_at, *signals = map(int, sys.argv[1:])
hanging = multiprocessing.Event()
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may run these tests
os.setpgid(0, 0)
stop.listen()
stop.training()
keep_workers()
rows = iter(DataLoader(Rows(), num_workers=1, batch_size=1))
[worker] = rows._workers
next(rows)
for number in signals:
    os.killpg(0, number)
    print(len([next(rows) for _ in range(10)]), stop.requested == number, flush=True)
if hangs_at >= 0:
    hanging.wait()
    _utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds until the worker is killed
rows._shutdown_workers()
worker.join()
print(worker.exitcode)
"""


def ended(hangs_at: int, *signals: int) -> str:
    argv = [sys.executable, "-c", RANK, str(hangs_at), *map(str, map(int, signals))]
    done = subprocess.run(argv, text=True, capture_output=True, check=False, timeout=120)
    return done.stdout + done.stderr


def test_a_worker_goes_on_after_each_signal_to_all_processes() -> None:
    """The rank saves after the step, for which it needs the worker's batch."""
    assert ended(-1, *SIGNALS) == "10 True\n" * len(SIGNALS) + "0\n"


def test_a_worker_that_does_not_end_is_killed() -> None:
    """torch sends it SIGTERM."""
    assert ended(1) == f"{-signal.SIGKILL}\n"


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_hang_up_that_nohup_ignores_stays_ignored(handler: signal.Handlers) -> None:
    assert signal.SIGHUP in SIGNALS
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert (signal.SIGHUP in heard()) == (handler == signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
