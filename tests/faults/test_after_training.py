"""A fault after the last step costs no step, and no step is taken twice."""

from __future__ import annotations

import json
import sys

import pytest
from fake_hub import fake_hub
from planted import FLAGS, LORA, STEPS, alive
from ranks import BACKENDS

MERGED = (*LORA, "--merge-adapter")
CONSTANT = ("--scheduler", "constant", "--lr", "1e-2")
UNSAVED = ("--save-strategy", "no")
PUSHED = ("--push-to-hub", "--username", "me")
HUB = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_TOKEN": "hf_planted"}


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


def test_a_signal_during_the_merge_keeps_what_is_saved_and_a_resume_merges(faults):
    run = faults.run("merge-stopped", "ddp", *MERGED, what="term", rank=0, phase="merge")
    assert run.code == 75
    assert f"trained and saved at step {STEPS}; `phalanx train` with --resume continues" in run.out + run.err
    assert (run.folder / "adapter_config.json").exists() and not (run.folder / "merged.part").exists()
    resumed = faults.run("merge-stopped", "ddp", *MERGED, "--resume")
    assert f"finished: at step {STEPS} already (" in resumed.out
    faults.same_end(resumed, "ddp", *MERGED)


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


@pytest.mark.slow
def test_a_failed_upload_trains_nothing_again_and_is_repeated_alone(faults):
    bench = faults.bench
    with fake_hub() as hub:
        hub.fail(401, message="Invalid credentials in Authorization header")
        environ = {"HF_ENDPOINT": hub.endpoint, **HUB}
        flags = [*BACKENDS["ddp"], *FLAGS, *PUSHED]
        run = bench.train("upload-refused", *flags, **environ)
        assert run.code == 10
        assert "trained and saved; upload failed: push_to_hub: me/upload-refused: the hub refuses" in run.err
        assert "restart" not in run.err and hub.repositories == {}
        hub.failures.clear()
        push = [sys.executable, "-m", "launcher", "push", "upload-refused"]
        done = bench.finish("upload-refused", push, **environ)
        assert done.code == 0, done.out + done.err
        assert f"pushed: {hub.endpoint}/me/upload-refused" in done.out
        assert set(hub.repositories) == {"me/upload-refused"}
        again = bench.train("upload-refused", *flags, "--resume", **environ)
        assert again.code == 0, again.out + again.err
        assert len(hub.repositories["me/upload-refused"].commits) == 1, "what is done is not repeated"
    assert json.loads((run.folder / "finished.json").read_text())["done"] == ["upload"]
