"""A fault during the upload, to a hub on loopback: only the upload is repeated."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from fake_hub import COMMIT, FakeHub, fake_hub
from planted import LORA, PATIENCE, PLANT, STEPS, Faults, Running, alive, fill
from ranks import Finished, kept_warm

HUB = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_TOKEN": "hf_planted"}
PUSHED = ("--push-to-hub", "--username", "me")
DATA = r"^/objects/\w+$"  # the bytes of a large file
QUICK = [0.1, 0.1, 0.1, 0.1]  # seconds between the attempts


@dataclass
class Uploads:
    """Runs with an upload, and the hub that gets them."""

    hub: FakeHub
    faults: Faults

    def commits(self, run: Finished) -> int:
        kept = self.hub.repositories.get(f"me/{run.folder.name}")
        return len(kept.commits) if kept else 0

    def finished(self, run: Finished) -> None:
        """Check that the run has its undisturbed end, and that its files are in the hub."""
        self.faults.same_end(run, "ddp")
        uploaded = self.hub.repositories[f"me/{run.folder.name}"].files
        assert uploaded["model.safetensors"] == (run.folder / "model.safetensors").read_bytes()
        assert json.loads((run.folder / "finished.json").read_text())["done"] == ["upload"]
        assert alive(run.folder) == []

    def resume(self, name: str, *flags: str) -> Finished:
        self.hub.recover()
        run = self.faults.run(name, "ddp", *flags, *PUSHED, "--resume")
        assert f"finished: at step {STEPS} already (" in run.out, run.out + run.err
        return run

    def started(self, name: str, *flags: str) -> Running:
        """Start a run, and wait until the hub has the bytes of a file and gives no answer."""
        self.hub.objects.clear()  # the hub does not ask for bytes that it has
        self.hub.hold(DATA)
        running = self.faults.start(name, "ddp", *PUSHED, *flags)
        running.wait_for(self.hub.holding.is_set)
        return running


@pytest.fixture(scope="module")
def with_hub(faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uploads]:
    with fake_hub() as hub:
        environ = faults.bench.environ | HUB | {"HF_ENDPOINT": hub.endpoint}
        planted = environ | {"PYTHONPATH": str(PLANT), "PHALANX_FAULT": "{}"}
        with kept_warm(tmp_path_factory.mktemp("warm"), planted) as path:
            yield Uploads(hub, replace(faults, bench=replace(faults.bench, environ=environ), warm=path))


@pytest.fixture
def uploads(with_hub: Uploads) -> Iterator[Uploads]:
    yield with_hub
    with_hub.hub.recover()


def test_a_cut_network_is_tried_again_then_recorded_and_a_resume_only_uploads(uploads):
    uploads.hub.cut(COMMIT)
    run = uploads.faults.run("cut", "ddp", *PUSHED, pauses=QUICK)
    assert run.code == 10, run.out + run.err
    assert "trained and saved; upload failed: UploadFailed: push_to_hub: me/cut: " in run.err
    assert "(attempt 5)" in run.err and run.out.count("Trying again.") == 4 and "restart" not in run.err
    assert json.loads((run.folder / "finished.json").read_text())["done"] == []
    uploads.hub.recover()
    uploads.hub.objects.clear()
    uploads.hub.cut(DATA, times=1)
    uploads.hub.cut(COMMIT, times=2)
    run = uploads.faults.run("cut", "ddp", *PUSHED, "--resume", pauses=QUICK)
    assert f"finished: at step {STEPS} already (" in run.out, run.out + run.err
    assert run.out.count("Trying again.") == 2
    uploads.finished(run)
    assert uploads.commits(run) == 1


@pytest.mark.slow
def test_without_a_network_the_run_does_all_but_the_upload(uploads):
    """The final save, the merge and the card ask nothing of the hub."""
    merged = (*LORA, "--merge-adapter")
    uploads.hub.cut(".")
    run = uploads.faults.run("no-network", "ddp", *merged, *PUSHED, pauses=QUICK)
    assert run.code == 10, run.out + run.err
    assert "trained and saved; upload failed: UploadFailed: push_to_hub: me/no-network: " in run.err
    assert json.loads((run.folder / "finished.json").read_text())["done"] == ["merge"]
    assert (run.folder / "README.md").exists()
    run = uploads.resume("no-network", *merged)
    uploads.faults.same_end(run, "ddp", *merged)
    assert uploads.commits(run) == 1


@pytest.mark.slow
def test_a_refused_upload_is_repeated_by_push(uploads):
    uploads.hub.fail(401, message="Invalid credentials in Authorization header")
    run = uploads.faults.run("refused-upload", "ddp", *PUSHED)
    assert run.code == 10
    assert "trained and saved; upload failed: push_to_hub: me/refused-upload: the hub refuses" in run.err
    assert "restart" not in run.err and uploads.commits(run) == 0
    uploads.hub.recover()
    push = [sys.executable, "-m", "launcher", "push", "refused-upload"]
    done = uploads.faults.bench.finish("refused-upload", push)
    assert done.code == 0, done.out + done.err
    assert f"pushed: {uploads.hub.endpoint}/me/refused-upload" in done.out
    uploads.finished(uploads.resume("refused-upload"))
    assert uploads.commits(run) == 1, "what is done is not repeated"


def test_a_signal_during_the_upload_stops_it_and_a_resume_only_uploads(uploads):
    """Though the hub gives no answer."""
    running = uploads.started("signalled")
    running.process.send_signal(signal.SIGTERM)
    stopped = running.end()
    assert stopped.code == 75, stopped.out + stopped.err
    assert f"trained and saved at step {STEPS}" in stopped.err and uploads.commits(stopped) == 0
    assert alive(stopped.folder) == []
    uploads.finished(uploads.resume("signalled"))


@pytest.mark.slow
def test_a_kill_during_the_upload_trains_nothing_again(uploads):
    running = uploads.started("killed-upload")
    os.kill(running.pid(0), signal.SIGKILL)
    uploads.hub.release()
    run = running.end()
    assert "rank 0 failed first: killed by SIGKILL" in run.err and "restart 1 of at most 10" in run.err
    assert f"finished: at step {STEPS} already (" in run.out
    uploads.finished(run)
    assert uploads.commits(run) == 1


@pytest.mark.slow
def test_a_kill_of_the_launcher_during_the_upload_leaves_it_to_a_resume(uploads):
    running = uploads.started("launcher-killed-upload")
    running.process.kill()
    assert running.process.wait(PATIENCE) == -signal.SIGKILL
    run = uploads.resume("launcher-killed-upload")
    uploads.finished(run)


@pytest.mark.slow
def test_an_upload_that_waits_for_ever_is_named_and_repeated(uploads):
    running = uploads.started("upload-waits", "--hang-timeout", "4")
    running.wait_for(lambda: (running.folder / "launch" / "attempt-2").exists())
    uploads.hub.release()
    run = running.end()
    assert "rank 0 failed first: hung: no progress for" in run.err and "in phase 'upload'" in run.err
    uploads.finished(run)


@pytest.mark.slow
def test_a_full_disk_during_the_upload_keeps_the_model_and_a_resume_ends_the_run(uploads, small_disk):
    """The upload itself writes nothing, but its record does."""
    folder = small_disk("full-upload", 1 << 30)
    running = uploads.started("full-upload")
    filler = fill(folder)
    uploads.hub.release()
    run = running.end()
    assert run.code == 10, run.out + run.err
    assert "trained and saved; the record of the upload failed: OSError: [Errno 28]" in run.err
    assert "restart" not in run.err
    filler.unlink()
    uploads.finished(uploads.resume("full-upload"))
