"""The upload of a model, to a hub that runs on the loopback."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import traceback
from itertools import pairwise
from pathlib import Path

import pytest
from fake_hub import COMMIT, CREATE, FakeHub, fake_hub
from fakes import fake_checkpoint
from saved_run import FACTS, finish_run

import trainers.push
from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.output.hub import UploadFailed, command, push
from trainers.output.model_card import write_card
from trainers.storage import run_files
from trainers.storage.ending import Ending
from trainers.storage.manifest import entry_of

CANARY = "hf_canaryCanaryCanaryCanaryCanary"
AT_ONCE = (0.0, 0.0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A local hub, at the address that the library takes from HF_ENDPOINT."""
    from huggingface_hub import constants

    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


def pushing(**more) -> TrainConfig:
    return TrainConfig(trainer="sft", push_to_hub=True, username="me", token=CANARY, **more)


def test_only_the_model_is_uploaded_to_a_private_repository(saved_run, hub: FakeHub, capsys):
    assert push(pushing(), saved_run) == f"{hub.endpoint}/me/my-run"
    repository = hub.repositories["me/my-run"]
    assert repository.private and len(repository.commits) == 1
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.jsonl"} <= set(
        repository.files
    )
    assert b"left here\n" not in repository.files.values()
    for name, content in repository.files.items():
        assert content == (saved_run / name).read_bytes()
    for ending in (CREATE, "/preupload/main", "/objects/batch", COMMIT):
        assert [request.authorization for request in hub.sent(ending)] == [f"Bearer {CANARY}"]
    shown = capsys.readouterr()
    assert f"pushed: {hub.endpoint}/me/my-run" in shown.out and CANARY not in shown.out + shown.err


def test_an_adapter_is_uploaded_without_local_folders(saved_adapter, hub: FakeHub, tmp_path):
    write_card(saved_adapter, pushing(model=str(tmp_path / "home" / "base"), peft=True), FACTS)
    push(pushing(), saved_adapter)
    files = hub.repositories["me/my-run"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert str(tmp_path) in (saved_adapter / "adapter_config.json").read_text()
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_a_file_that_the_run_did_not_write_is_not_uploaded(saved_run, hub: FakeHub):
    """The config may be in the run's folder, and have a token."""
    (saved_run / "config.yaml").write_text("hub: {token: hf_secret}")
    push(pushing(), saved_run)
    assert "config.yaml" not in hub.repositories["me/my-run"].files
    assert "README.md" in hub.repositories["me/my-run"].files


def test_additional_chat_templates_of_the_run_are_uploaded(saved_run, hub: FakeHub):
    folder = run_files.make_folder(saved_run, "additional_chat_templates")
    for name in ("tools.jinja", "mine.jinja"):
        (folder / name).write_text("{{ messages }}")
    ending = finish_run(saved_run)
    ending.replace([], [entry_of(saved_run, folder / "tools.jinja")])
    ending.write(saved_run)
    push(pushing(), saved_run)
    files = hub.repositories["me/my-run"].files
    assert "additional_chat_templates/tools.jinja" in files
    assert "additional_chat_templates/mine.jinja" not in files


THEIRS = (
    "config.yaml",
    "secret.txt",
    "log",
    "train.log",
    "other.safetensors",
    "README.md.kept-1",
    "vocab.bak",
)
RECORDS = {
    "recorded": lambda path: None,
    "without a record": lambda path: path.unlink(),
    "with an empty record": lambda path: path.write_text(""),
    "with a cut record": lambda path: path.write_text(path.read_text()[:40]),
}


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "of an earlier version"])
@pytest.mark.parametrize("record", RECORDS)
def test_no_file_of_the_user_is_uploaded_and_the_model_is(saved_run, hub: FakeHub, tmp_path, record, listed):
    """`cp -r run/* new/` leaves the record behind, because its name begins with a dot."""
    if not listed:
        Ending(step=4, metrics={}, model_step=4).write(saved_run)
    RECORDS[record](saved_run / run_files.WRITTEN)
    for name in THEIRS:
        (saved_run / name).write_text("theirs")
    (tmp_path / "outside.json").write_text("theirs")
    for name in ("merges.txt", "added_tokens.json", "link.safetensors"):
        (saved_run / name).symlink_to(tmp_path / "outside.json")
    push(pushing(), saved_run)
    files = hub.repositories["me/my-run"].files
    assert b"theirs" not in files.values()
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.jsonl"} <= set(files)
    words = shlex.split(command("me/my-run", saved_run))
    by_hand = {word for option, word in pairwise(words) if option == "--include"}
    assert by_hand == set(files) and "--exclude" not in words


@pytest.mark.parametrize("way", ["gone", "links", "of no finished run", "of an earlier version"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_without_the_files_of_the_model_nothing_is_sent(saved_run, hub: FakeHub, tmp_path, way, name):
    weights = saved_run / name
    if way == "of an earlier version":
        Ending(step=4, metrics={}, model_step=4).write(saved_run)
        weights = saved_run / "model.safetensors"
    if way == "of no finished run":
        (saved_run / "finished.json").unlink()
    else:
        weights.rename(tmp_path / "moved")
    if way == "links":
        weights.symlink_to(tmp_path / "moved")
    with pytest.raises(
        ConfigError, match=rf"no weights to upload|has no finished\.json|{name} is missing or a link"
    ):
        push(pushing(), saved_run)
    assert hub.requests == []


@pytest.mark.parametrize("copy", [True, False], ids=["with a checkpoint of its step", "without"])
def test_a_damaged_model_is_not_uploaded(saved_run, hub: FakeHub, capsys, copy):
    config = {"trainer": {"value": "sft"}, "username": {"value": "me"}}
    (saved_run / "run.json").write_text(json.dumps({"config": config, "versions": {}}))
    if copy:
        fake_checkpoint(saved_run, 4)
    weights = saved_run / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 64
    weights.write_bytes(content)
    assert trainers.push.main([str(saved_run)]) == 2
    message = capsys.readouterr().err
    assert "the final model is damaged: model.safetensors has changed since it was written" in message
    assert ("it saves the model again, from checkpoint-4" if copy else "Restore the file") in message
    assert hub.requests == []


def test_an_existing_repository_gets_another_commit(saved_run, hub: FakeHub, capsys):
    push(pushing(), saved_run)
    hub.repositories["me/my-run"].private = False
    push(pushing(), saved_run)
    assert len(hub.repositories["me/my-run"].commits) == 2
    assert "is public" in capsys.readouterr().out


def test_weights_of_an_earlier_push_are_deleted(saved_adapter, tiny_model, hub: FakeHub):
    """from_pretrained prefers an adapter to a full model."""
    push(pushing(), saved_adapter)
    assert "adapter_model.safetensors" in hub.repositories["me/my-run"].files
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (saved_adapter / name).unlink()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, saved_adapter)
    finish_run(saved_adapter)
    push(pushing(), saved_adapter)
    files = hub.repositories["me/my-run"].files
    assert "model.safetensors" in files and not any("adapter" in name for name in files)
    assert len(hub.repositories["me/my-run"].commits) == 2, "in the same commit"


@pytest.mark.parametrize("ending", [CREATE, COMMIT])
def test_a_busy_hub_is_tried_again(saved_run, hub: FakeHub, ending, capsys):
    hub.fail(503, ending, times=2, message=f"busy {CANARY}")
    push(pushing(), saved_run, AT_ONCE)
    assert len(hub.sent(ending)) == 3 and len(hub.repositories["me/my-run"].commits) == 1
    out = capsys.readouterr().out
    assert out.count("Trying again") == 2 and CANARY not in out


@pytest.mark.parametrize("ending", [CREATE, COMMIT])
def test_a_network_that_is_cut_is_tried_again(saved_run, hub: FakeHub, ending, capsys):
    hub.cut(ending, times=2)
    push(pushing(), saved_run, AT_ONCE)
    assert len(hub.repositories["me/my-run"].commits) == 1 and sum(hub.cuts.values()) == 0
    assert capsys.readouterr().out.count("Trying again") == 2
    hub.cut(ending)
    assert "(attempt 3)" in failing(saved_run, pushing(), UploadFailed)


def failing(folder: Path, config: TrainConfig, kind: type[Exception]) -> str:
    """Return the message of a push that must fail. Neither it nor its traceback may contain the token."""
    with pytest.raises(kind) as raised:
        push(config, folder, AT_ONCE)
    assert (config.token or "") not in "".join(traceback.format_exception(raised.value))
    message = str(raised.value)
    assert "\n" not in message
    assert f"The model is safe in {folder}" in message and "hf upload" in message
    return message


def test_a_hub_that_stays_busy_is_an_error(saved_run, hub: FakeHub):
    hub.fail(503, CREATE)
    message = failing(saved_run, pushing(), RuntimeError)
    assert "503" in message and "attempt 3" in message and len(hub.sent(CREATE)) == 3


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_a_config_error(saved_run, hub: FakeHub, status):
    hub.fail(status, message=f"Bearer {CANARY} is no token")
    message = failing(saved_run, pushing(), ConfigError)
    assert message.startswith("push_to_hub: me/my-run:") and str(status) in message and "(hidden)" in message
    assert len(hub.sent(CREATE)) == 1


def test_a_permanent_error_is_not_tried_again(saved_run, hub: FakeHub):
    hub.fail(400, COMMIT, message="bad commit")
    message = failing(saved_run, pushing(), RuntimeError)
    assert "bad commit" in message and len(hub.sent(COMMIT)) == 1


def test_an_address_without_a_hub_is_an_error(saved_run, monkeypatch):
    from huggingface_hub import constants

    with fake_hub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "ConnectError" in failing(saved_run, pushing(), RuntimeError)


def test_the_offline_mode_is_a_config_error(saved_run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failing(saved_run, pushing(), ConfigError)


@pytest.mark.parametrize("name", ["my run", "a--b"])
def test_a_name_that_the_hub_does_not_allow_is_a_config_error(saved_run, hub: FakeHub, name):
    other = saved_run.rename(saved_run.parent / name)
    assert name in failing(other, pushing(), ConfigError)
    assert hub.requests == []


@pytest.mark.parametrize("token", ["two words", "line\nend", "täken"])
def test_a_token_that_cannot_be_sent_is_not_printed(saved_run, hub: FakeHub, token):
    failing(saved_run, TrainConfig(username="me", token=token), ConfigError)
    assert hub.requests == []


def test_the_address_is_the_librarys_setting(saved_run, tmp_path, monkeypatch):
    """The library reads HF_ENDPOINT when it is imported, so this test starts a new process."""
    code = (
        "import sys; from pathlib import Path\n"
        "from trainers.config.schema import TrainConfig; from trainers.output.hub import push\n"
        "import os; push(TrainConfig(username='me', token=os.environ['HF_TOKEN']), Path(sys.argv[1]))\n"
    )
    with fake_hub() as hub:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", CANARY)
        done = subprocess.run([sys.executable, "-c", code, str(saved_run)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"pushed: {hub.endpoint}/me/my-run" in done.stdout
        assert CANARY not in done.stdout + done.stderr
        assert "model.safetensors" in hub.repositories["me/my-run"].files
