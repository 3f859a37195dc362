"""auto_find_batch_size without ranks: what is tried next, where it continues, and what is printed.

A short script replaces accelerate and the ranks. It reads the config of its attempt, and writes the note that
a rank would write.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_checkpoint
from places import HELPERS

from launcher.cli import main
from launcher.config import Run
from launcher.plan.batch_search import announce, next_smaller, with_smaller_batch
from launcher.plan.topology import Hardware
from launcher.supervise import attempt
from trainers.config.errors import OUT_OF_MEMORY, USAGE_ERROR
from trainers.config.file import effective_text, load_settings
from trainers.config.schema import TrainConfig
from trainers.storage import folder_lock


@pytest.mark.parametrize(
    ("start", "batches"),
    [
        ((8, 1), [(4, 2), (2, 4), (1, 8)]),
        ((6, 2), [(3, 4), (1, 12)]),
        ((7, 3), [(1, 21)]),
        ((9, 1), [(3, 3), (1, 9)]),
        ((15, 2), [(5, 6), (1, 30)]),
        ((1, 4), []),
    ],
)
def test_each_batch_divides_the_one_before(start: tuple[int, int], batches: list[tuple[int, int]]) -> None:
    found: list[tuple[int, int]] = []
    batch: tuple[int, int] | None = start
    while batch := next_smaller(TrainConfig(batch_size=batch[0], gradient_accumulation=batch[1])):
        found.append(batch)
        assert batch[0] * batch[1] == start[0] * start[1]
    assert found == batches


@pytest.mark.parametrize(
    ("loss", "sizes"),
    [(None, {8: 4, 4: 2, 2: None, 3: None, 6: 3, 9: 3}), ("apo_zero_unpaired", {2: 1, 3: 1})],
)
def test_kto_keeps_the_batch_size_that_it_needs(loss: str | None, sizes: dict[int, int | None]) -> None:
    for size, expected in sizes.items():
        found = next_smaller(TrainConfig(trainer="kto", loss_type=loss, batch_size=size))
        assert (found and found[0]) == expected, size


def test_the_next_attempt_differs_only_in_its_batch(asked: Callable[..., Run], tmp_path: Path) -> None:
    run = asked(batch_size=8, gradient_accumulation=2, auto_find_batch_size=True, valid_split="train", lr=0.5)
    new = with_smaller_batch(run)
    assert new is not None
    before, after = run.settings.public(), new.settings.public()
    assert {name: after[name] for name in after if after[name] != before[name]} == {
        "batch_size": 4,
        "gradient_accumulation": 4,
        "per_device_eval_batch_size": 4,
    }
    why = "auto_find_batch_size (8 ran out of memory)"
    sources = new.settings.sources
    assert sources["batch_size"] == sources["gradient_accumulation"] == why
    assert sources["per_device_eval_batch_size"] == "derived: batch_size"
    assert sources["lr"] == "flag --lr" and sources["seed"] == "default"
    assert new.settings.notes == run.settings.notes
    # A rank reads the same values.
    (tmp_path / "config.json").write_text(effective_text(new.settings))
    read = load_settings(tmp_path / "config.json")
    assert (read.train.batch_size, read.train.gradient_accumulation) == (4, 4)
    assert read.sources["batch_size"] == why


def test_an_evaluation_batch_that_the_user_set_stays(asked: Callable[..., Run]) -> None:
    new = with_smaller_batch(asked(batch_size=8, valid_split="train", per_device_eval_batch_size=16))
    assert new is not None and new.train.per_device_eval_batch_size == 16


def test_the_token_is_kept(asked: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    run = asked(batch_size=8, push_to_hub=True, username="me")
    monkeypatch.delenv("HF_TOKEN")
    new = with_smaller_batch(run)
    assert new is not None and new.train.token == "secret"


def test_the_line_says_where_the_next_attempt_starts(asked: Callable[..., Run]) -> None:
    run = asked(batch_size=8)
    new = with_smaller_batch(run)
    assert new is not None
    assert announce(run, new, 1, Path("run/checkpoint-3")) == (
        "rank 1 ran out of memory with batch_size 8: trying batch_size 4 and gradient_accumulation 8 "
        "(the same global batch), from run/checkpoint-3"
    )
    again = with_smaller_batch(new)
    assert again is not None
    assert announce(new, again, 0, None).endswith("from the start")


# The script in place of the ranks. If batch_size is above `fits`, rank 1 writes an error note.
# `codes`: its exit codes, by attempt. `step`: the first attempt writes a checkpoint of this step.
# `hold`: seconds that an attempt takes if its batch fits.
LAUNCH = f"""
import json, os, pathlib, sys, time
sys.path.insert(0, {str(HELPERS)!r})
fits, codes, kind, step, hold = json.loads(sys.argv[1])
folder = pathlib.Path(sys.argv[2]).parent
config = json.loads((folder / "config.json").read_text())["config"]
(folder / "rank-0.pid").write_text(str(os.getpid()))
if step and not pathlib.Path(config["project_name"], f"checkpoint-{{step}}").exists():
    from fakes import fake_checkpoint
    fake_checkpoint(pathlib.Path(config["project_name"]), step)
if config["batch_size"] > fits:
    attempt = int(folder.name.rpartition("-")[2])
    note = {{"rank": 1, "time": time.monotonic(), "code": codes[min(attempt, len(codes)) - 1], "type": kind,
             "message": "CUDA out of memory.", "peer_lost": False}}
    (folder / "rank-1.error.json").write_text(json.dumps(note))
    sys.exit(1)
(folder / "rank-0.log").write_text("a line of rank 0\\n")
time.sleep(hold)
"""


@pytest.fixture
def launched(
    work: Path, hardware: Callable[[Hardware], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Return launched(): `launched("--flag", fits=2)` is the exit code of a run with LAUNCH as its ranks."""

    def train(
        *flags: str,
        fits: int,
        codes: tuple[int, ...] = (OUT_OF_MEMORY,),
        kind: str = "BatchTooLarge",
        step: int = 0,
        hold: float = 0.0,
    ) -> int:
        stub = [sys.executable, "-c", LAUNCH, json.dumps([fits, codes, kind, step, hold])]
        monkeypatch.setattr(attempt, "build_command", lambda *given: [*stub, str(given[-1].config)])
        argv = ["llm", "--train", "--trainer", "sft", "--model", "model", "--project-name", "run", *flags]
        argv += ["--data-path", "data", "--num-processes", "2", "--distributed-backend", "ddp"]
        try:
            return main([*argv, "--start", "accelerate"])
        finally:
            while folder_lock._held:
                folder_lock._held.pop().close()  # in a real start the process ends here

    return train


SEARCH = ("--auto-find-batch-size", "--batch-size", "8")


def config_of(attempt: int) -> dict[str, Any]:
    text = Path(f"run/launch/attempt-{attempt}/config.json").read_text()
    config: dict[str, Any] = json.loads(text)["config"]
    return config


def test_it_searches_until_it_fits(launched: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launched(*SEARCH, "--gradient-accumulation", "1", fits=2) == 0
    sizes = [(config_of(n)["batch_size"], config_of(n)["gradient_accumulation"]) for n in (1, 2, 3)]
    assert sizes == [(8, 1), (4, 2), (2, 4)]
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if "out of memory" in line] == [
        "auto_find_batch_size: "
        "rank 1 ran out of memory with batch_size 8: trying batch_size 4 and gradient_accumulation 2 "
        "(the same global batch), from the start",
        "auto_find_batch_size: "
        "rank 1 ran out of memory with batch_size 4: trying batch_size 2 and gradient_accumulation 4 "
        "(the same global batch), from the start",
    ]
    assert "a line of rank 0" in out and "done: run" in out
    assert err == ""


def test_it_gives_up_at_the_smallest(launched: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launched(*SEARCH, fits=0) == OUT_OF_MEMORY
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "error: rank 1 failed first (out of memory): BatchTooLarge: CUDA out of memory."
    assert lines[1].strip() == "auto_find_batch_size tried batch_size 8, 4, 2 and 1; 1 is the smallest."
    assert lines[2].strip().startswith("What needs less memory: a block_size below 1024; peft: true; ")
    assert lines[3].strip().startswith("logs of all ranks: ") and lines[3].endswith("run/launch/attempt-4")


def test_without_the_search_the_error_names_a_smaller_batch(
    launched: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched("--batch-size", "8", fits=2) == OUT_OF_MEMORY
    err = capfd.readouterr().err
    assert "Set batch_size: 4 and gradient_accumulation: 8 (the same global batch), or auto_find" in err
    assert not Path("run/launch/attempt-2").exists()


def test_out_of_memory_while_loading_starts_no_search(
    launched: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(*SEARCH, fits=2, kind="OutOfMemoryError") == OUT_OF_MEMORY
    assert "a smaller batch_size does not help" in capfd.readouterr().err
    assert not Path("run/launch/attempt-2").exists()


def test_the_next_attempt_resumes_from_a_checkpoint_of_this_start(
    launched: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(*SEARCH, fits=2, step=5) == 0
    assert [config_of(n)["resume"] for n in (1, 2, 3)] == [False, True, True]
    lines = [line for line in capfd.readouterr().out.splitlines() if "out of memory" in line]
    assert len(lines) == 2 and all(line.endswith("from run/checkpoint-5") for line in lines)


def test_a_checkpoint_newer_than_the_named_one_is_set_aside(
    launched: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 6):
        fake_checkpoint(Path("run"), step)
    assert launched(*SEARCH, "--resume", "run/checkpoint-3", fits=4) == 0
    assert [config_of(n)["resume"] for n in (1, 2)] == ["run/checkpoint-3", True]
    assert "(the same global batch), from run/checkpoint-3\n" in capfd.readouterr().out
    assert sorted(path.name for path in Path("run").glob("*checkpoint-*")) == [
        "checkpoint-3",
        "set-aside-1-checkpoint-6",
    ]


def test_overwrite_applies_only_to_the_first_attempt(launched: Callable[..., int]) -> None:
    assert launched(*SEARCH, fits=8) == 0
    assert launched(*SEARCH, "--overwrite", fits=2, step=5) == 0
    assert [config_of(n)["batch_size"] for n in (1, 2, 3)] == [8, 4, 2]
    assert (config_of(3)["resume"], config_of(3)["overwrite"]) == (True, False)


def test_another_error_ends_the_search(
    launched: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    codes = (OUT_OF_MEMORY, USAGE_ERROR)
    assert launched(*SEARCH, fits=2, codes=codes) == USAGE_ERROR
    assert capfd.readouterr().err.strip() == "error: CUDA out of memory."
    assert not Path("run/launch/attempt-3").exists()


def test_a_signal_between_two_attempts_stops_the_run(
    launched: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare = attempt.prepare

    def interrupted(run: Run, *rest: Any) -> Any:
        if run.train.batch_size == 4:
            signal.raise_signal(signal.SIGINT)
        return prepare(run, *rest)

    monkeypatch.setattr(attempt, "prepare", interrupted)
    assert launched(*SEARCH, fits=4, hold=60) == 128 + signal.SIGINT
    assert "stopped by SIGINT" in capfd.readouterr().err
