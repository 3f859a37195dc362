"""A fault in the evaluation on the test split, after training: no step is taken again, and it is repeated."""

from __future__ import annotations

import json

import pytest
from planted import LORA, STEPS, alive

TESTED = ("--test-split", "valid")
UNSAVED = ("--save-strategy", "no")  # the final model is all that a repetition has


def same_test_loss(faults, run, backend, *flags):
    """Check that the run has the end of an undisturbed one, with the same loss on the test split, once."""
    faults.same_end(run, backend, *flags)
    found, expected = (
        [e["test_loss"] for e in one.metrics if "test_loss" in e]
        for one in (run, faults.uninterrupted(backend, *flags))
    )
    assert found == expected and len(found) == 1
    assert len([entry for entry in run.metrics if "train_runtime" in entry]) == 1
    assert json.loads((run.folder / "finished.json").read_text())["done"] == ["evaluation"]
    assert alive(run.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        ("one", UNSAVED),
        ("ddp", UNSAVED),
        ("ddp", (*LORA, *UNSAVED)),
        ("fsdp", ()),
        ("fsdp", (*LORA, *UNSAVED)),
        ("zero2", UNSAVED),
        ("zero3", UNSAVED),
        ("zero3", (*LORA, *UNSAVED)),
    ],
)
def test_a_kill_repeats_only_the_evaluation(faults, backend, flags):
    name = f"killed-test-{backend}-{len(flags)}"
    run = faults.run(name, backend, *TESTED, *flags, what="kill", rank=0, evaluation=STEPS)
    assert "rank 0 failed first: killed by SIGKILL" in run.err, run.out + run.err
    assert f"finished: at step {STEPS} already (" in run.out
    same_test_loss(faults, run, backend, *TESTED, *flags)


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_only_the_evaluation_repeated(faults):
    # The launcher wakes the rank. The longer split and the pause keep it from ending meanwhile.
    flags = ("--test-split", "train", *UNSAVED)
    stopped = {"what": "stop", "rank": 1, "evaluation": STEPS, "pause": 0.5}
    run = faults.run("hung-test", "ddp", *flags, "--hang-timeout", "4", **stopped)
    assert "rank 1 failed first: stopped (SIGSTOP" in run.err, run.out + run.err
    assert f"finished: at step {STEPS} already (" in run.out
    same_test_loss(faults, run, "ddp", *flags)


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_it_and_a_resume_repeats_it(faults, backend):
    name = f"stopped-test-{backend}"
    run = faults.run(name, backend, *TESTED, *UNSAVED, what="term", rank=1, evaluation=STEPS)
    assert run.code == 75, run.out + run.err
    assert f"trained and saved at step {STEPS}; `phalanx train` with --resume continues" in run.out + run.err
    assert not any("test_loss" in entry for entry in run.metrics) and alive(run.folder) == []
    run = faults.run(name, backend, *TESTED, *UNSAVED, "--resume")
    assert f"finished: at step {STEPS} already (" in run.out, run.out + run.err
    same_test_loss(faults, run, backend, *TESTED, *UNSAVED)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fail", "full"])
def test_a_failure_is_an_end_of_its_own_and_a_resume_repeats_it(faults, what):
    name = f"failed-test-{what}"
    run = faults.run(name, "ddp", *TESTED, what=what, rank=1, evaluation=STEPS)
    assert run.code == 10, run.out + run.err
    assert "rank 1 failed first (unfinished): trained and saved; evaluation failed: " in run.err
    assert "restart" not in run.err and (run.folder / "model.safetensors").exists()
    run = faults.run(name, "ddp", *TESTED, "--resume")
    same_test_loss(faults, run, "ddp", *TESTED)
