"""A fault after the last step costs no step, and no step is taken twice."""

from __future__ import annotations

import pytest
from planted import LORA, STEPS, alive

MERGED = (*LORA, "--merge-adapter")
CONSTANT = ("--scheduler", "constant", "--lr", "1e-2")
UNSAVED = ("--save-strategy", "no")


@pytest.mark.parametrize(
    ("backend", "flags", "phase"),
    [
        ("ddp", (*MERGED, *UNSAVED), "merge"),
        pytest.param("ddp", (*MERGED, *CONSTANT), "final save", marks=pytest.mark.slow),
        pytest.param("fsdp", CONSTANT, "final save", marks=pytest.mark.slow),
        pytest.param("zero2", CONSTANT, "final save", marks=pytest.mark.slow),
        pytest.param("zero3", CONSTANT, "final save done", marks=pytest.mark.slow),
        pytest.param("ddp", (*MERGED, *UNSAVED), "final save done", marks=pytest.mark.slow),
        pytest.param("ddp", MERGED, "merge done", marks=pytest.mark.slow),
        pytest.param("ddp", MERGED, "model card", marks=pytest.mark.slow),
        pytest.param("fsdp", MERGED, "merge", marks=pytest.mark.slow),
    ],
)
def test_a_kill_after_the_last_step_trains_nothing_again(faults, backend, flags, phase):
    name = f"killed-{backend}-{phase.replace(' ', '-')}"
    run = faults.run(name, backend, *flags, what="kill", rank=0, phase=phase)
    assert "restart 1 of at most 10" in run.err
    faults.same_end(run, backend, *flags)
    assert alive(run.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "flags", "phase"),
    [
        ("ddp", (), "final save"),
        ("fsdp", (), "final save"),
        ("zero3", (), "final save"),
        ("ddp", MERGED, "merge"),
        ("ddp", (), "model card"),
    ],
)
def test_a_rank_that_waits_after_the_last_step_is_named_and_trains_nothing_again(
    faults, backend, flags, phase
):
    name = f"waits-{backend}-{phase.replace(' ', '-')}"
    run = faults.run(name, backend, *flags, "--hang-timeout", "4", what="wait", rank=0, phase=phase)
    assert "rank 0 failed first: hung: no progress for" in run.err and "restart 1" in run.err, run.err
    assert "in wait_for_a_server" in (run.folder / "launch" / "attempt-1" / "rank-0.stack").read_text()
    faults.same_end(run, backend, *flags)
    assert alive(run.folder) == []


def test_a_signal_during_the_merge_keeps_what_is_saved_and_a_resume_merges(faults):
    run = faults.run("merge-stopped", "ddp", *MERGED, what="term", rank=0, phase="merge")
    assert run.code == 75
    assert f"trained and saved at step {STEPS}; `phalanx train` with --resume continues" in run.out + run.err
    assert (run.folder / "adapter_config.json").exists() and not (run.folder / "merged.part").exists()
    resumed = faults.run("merge-stopped", "ddp", *MERGED, "--resume")
    assert f"finished: at step {STEPS} already (" in resumed.out
    faults.same_end(resumed, "ddp", *MERGED)


@pytest.mark.parametrize(
    ("phase", "rank"),
    [
        ("final save", 1),
        pytest.param("final save", 0, marks=pytest.mark.slow),
        pytest.param("final save done", 1, marks=pytest.mark.slow),
        pytest.param("model card", 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_at_the_end_lets_the_save_end_and_a_resume_does_the_rest(faults, phase, rank):
    name = f"stopped-{phase.replace(' ', '-')}-{rank}"
    run = faults.run(name, "ddp", what="term", rank=rank, phase=phase)
    assert run.code == 75, run.out + run.err
    assert f"trained and saved at step {STEPS}; `phalanx train` with --resume continues" in run.out + run.err
    assert alive(run.folder) == [] and not (run.folder / "README.md").exists()
    resumed = faults.run(name, "ddp", "--resume")
    assert f"finished: at step {STEPS} already (" in resumed.out
    faults.same_end(resumed, "ddp")
    assert (run.folder / "README.md").exists()


@pytest.mark.slow
def test_a_full_disk_at_the_model_card_is_an_end_of_its_own(faults):
    run = faults.run("card-full", "ddp", what="full", rank=0, phase="model card")
    assert run.code == 10, run.out + run.err
    assert "trained and saved; model card failed: OSError: [Errno 28] No space left on device" in run.err
    assert "restart" not in run.err
    resumed = faults.run("card-full", "ddp", "--resume")
    faults.same_end(resumed, "ddp")
    assert (run.folder / "README.md").exists()


def test_a_full_disk_during_the_merge_is_an_end_of_its_own(faults):
    run = faults.run("merge-full", "ddp", *MERGED, what="full", rank=0, phase="merge")
    assert run.code == 10
    assert "trained and saved; merge failed: OSError: [Errno 28] No space left on device" in run.err
    assert "restart" not in run.err
    assert (run.folder / "adapter_model.safetensors").exists()


def test_a_resume_of_a_finished_run_changes_nothing(faults):
    run = faults.run("finished", "ddp", *UNSAVED)
    before = {path.name: path.read_bytes() for path in run.folder.glob("*.safetensors")}
    resumed = faults.run("finished", "ddp", *UNSAVED, "--resume")
    assert resumed.code == 0, resumed.out + resumed.err
    assert f"finished: at step {STEPS} already (" in resumed.out
    assert {path.name: path.read_bytes() for path in run.folder.glob("*.safetensors")} == before
    assert [entry["step"] for entry in resumed.metrics if "loss" in entry] == list(range(1, STEPS + 1))
