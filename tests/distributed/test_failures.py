"""A run that is stopped or breaks: the exit code, the rank that is named, and no process left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from ranks import BACKENDS

LONG = [*BACKENDS["ddp"], "--max-steps", "100000", "--eval-strategy", "no", "--save-steps", "100000"]
PATIENCE = 120.0


def wait_for(condition, process=None) -> None:
    """Waits until a condition holds; a limit, not a measurement."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the run did not come so far"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)


def alive(folder: Path) -> list[str]:
    """Command lines of the processes that belong to a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder / "launch").encode() in line:
                found.append(line.decode(errors="replace"))
    return found


@pytest.fixture
def training(bench, request):
    """A long run whose ranks are in their first steps."""
    name = f"long-{request.node.name}".replace("[", "-").replace("]", "")
    process = bench.start(name, *LONG)
    folder = bench.root / name
    wait_for(lambda: (folder / "metrics.jsonl").exists(), process)
    yield process, folder, folder / "launch" / "attempt-1"
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_a_killed_rank_is_named(training):
    process, folder, logs = training
    os.kill(int((logs / "rank-1.pid").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "error: rank 1 failed first: killed by SIGKILL" in err
    assert str(logs) in err
    assert alive(folder) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_ranks(training, number, code):
    process, folder, _ = training
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert f"stopped by {signal.Signals(number).name}" in err
    assert alive(folder) == []


def test_no_rank_outlives_a_killed_launcher(training):
    process, folder, _ = training
    assert len(alive(folder)) >= 3  # accelerate and two ranks
    process.kill()
    process.communicate()
    wait_for(lambda: alive(folder) == [])


def test_an_exception_in_one_rank_is_named_and_shown(bench, tmp_path):
    # A planted fault: in rank 1 alone, importing trl fails.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    class Fault:\n"
        "        def find_spec(self, name, *_):\n"
        "            if name == 'trl': raise RuntimeError('planted fault')\n"
        "    sys.meta_path.insert(0, Fault())\n"
    )
    run = bench.train("planted", *BACKENDS["ddp"], PYTHONPATH=str(tmp_path))
    assert run.code == 1
    assert "error: rank 1 failed first: RuntimeError: planted fault" in run.err
    assert "in find_spec" in run.err and "rank-1.log" in run.err
    assert alive(run.folder) == []


def test_a_mistake_that_only_a_rank_can_see_is_one_line(bench, tmp_path):
    from tiny import build_tiny_model

    model = build_tiny_model(tmp_path / "bare", chat_template=False)
    run = bench.train("no-template", *BACKENDS["ddp"], "--model", str(model))
    assert run.code == 2
    assert (
        run.err.strip().splitlines()[-1].startswith("error: chat_template: this model's tokenizer has none.")
    )
    assert "Traceback" not in run.out + run.err


def test_by_hand_a_taken_folder_is_refused(bench, trained):
    taken = trained("one", "full").folder.name
    argv = ["accelerate", "launch", "--num_processes", "1", "-m", "trainers.sft", str(bench.config(taken))]
    run = bench.finish(taken, argv)
    assert run.code != 0
    assert f"project_name: {taken} holds another run" in run.err
