"""The check of the saved files, the model card, and the upload to a hub that runs on the loopback."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml
from fake_hub import COMMIT, CREATE, FakeHub, fake_hub

from trainers.config.errors import ConfigError
from trainers.config.kinds import KINDS
from trainers.config.schema import TrainConfig
from trainers.output.hub import push
from trainers.output.model_card import write_card
from trainers.storage.saved_model import check_saved

CANARY = "hf_canaryCanaryCanaryCanaryCanary"
AT_ONCE = (0.0, 0.0)
FACTS = {
    "trainer": "SFTTrainer",
    "world_size": 2,
    "distributed_type": "FSDP",
    "device": "cpu",
    "global_batch": 8,
    "data": {
        "train": {
            "rows": 40,
            "tokens": 2120,
            "supervised_tokens": 1138,
            "longest": 68,
            "truncated": 3,
            "dropped": {"no trained token": 2, "duplicate": 0},
        },
        "valid": {
            "rows": 4,
            "tokens": 190,
            "supervised_tokens": 96,
            "longest": 63,
            "truncated": 0,
            "dropped": {},
        },
    },
    "versions": {"torch": "1.2.3"},
}
LOGGED = (
    {"step": 1, "loss": 6.5, "learning_rate": 1e-3, "tokens_per_second": 9.9},
    {"step": 2, "loss": 5.25},
    {"step": 2, "eval_loss": 5.5, "eval_runtime": 0.5, "eval_num_tokens": 7},
    {"step": 4, "eval_loss": 5.75},
    {"step": 4, "train_loss": 5.9, "train_runtime": 1.0},
)


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """The folder of a finished run, with the model and all other files that a run writes."""
    folder = tmp_path / "home" / "my-run"
    shutil.copytree(tiny_model, folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOGGED))
    (folder / "README.md").write_text("a card\n")
    for name in (
        "run.json",
        "trainer_state.json",
        "training_args.bin",
        "tracker.json",
        "metrics.part",
        ".env",
        "checkpoint-2/model.safetensors",
        "launch/attempt-1/rank-0.log",
        "wandb/offline-run/run.wandb",
        "runs/events",
        "data/train.arrow",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left here\n")
    return folder


@pytest.fixture
def adapter(folder: Path) -> Path:
    """The folder of the same run with an adapter, whose base model is in a folder of this machine."""
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    base = {"base_model_name_or_path": str(folder.parent / "base"), "peft_type": "LORA", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    return folder


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


def test_a_saved_model_and_a_saved_adapter_pass_the_check(folder, adapter):
    check_saved(adapter)
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    (adapter / "config.json").write_text("{}")
    check_saved(adapter)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", "cut"),
        ("model.safetensors", "longer"),
        ("tokenizer_config.json", None),
        ("tokenizer.json", None),
        ("tokenizer.json", b'{"model"'),
        ("extra.safetensors", b"xxxx"),
    ],
)
def test_a_broken_file_is_named(folder, name, content):
    path = folder / name
    if content is None:
        path.unlink()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif content == "longer":
        path.write_bytes(path.read_bytes() + b"more")
    else:
        path.write_bytes(content)
    with pytest.raises(RuntimeError, match="the saved model is broken") as raised:
        check_saved(folder)
    assert (str(folder) if name == "tokenizer.json" and content is None else name) in str(raised.value)


def write_weights(path: Path, **shapes: list[int]) -> None:
    """Write a weight file of float32 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def test_the_files_and_tensors_of_an_index_must_exist(folder):
    (folder / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {"weight_map": {"a": first, "b": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(folder / first, a=[2])
    with pytest.raises(RuntimeError, match=f"{second} is missing"):
        check_saved(folder)
    write_weights(folder / second, c=[2])
    with pytest.raises(RuntimeError, match=f"{second} lacks b"):
        check_saved(folder)
    write_weights(folder / second, b=[2])
    check_saved(folder)


@pytest.mark.parametrize(("shapes", "words"), [({}, "no tensor"), ({"a": [2], "b": [0]}, "b has no values")])
def test_weights_that_were_not_gathered_fail_the_check(folder, shapes, words):
    write_weights(folder / "model.safetensors", **shapes)
    with pytest.raises(RuntimeError, match=words):
        check_saved(folder)


def card(folder: Path, config: TrainConfig, facts: dict) -> tuple[dict, str]:
    """Write the card; return its metadata and its text."""
    write_card(folder, config, facts)
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_shows_what_was_done_and_measured(folder, tmp_path):
    data = tmp_path / "home" / "secret-folder" / "rows"
    data.mkdir(parents=True)
    config = pushing(model="org/base", data_path=str(data), lr=1e-3, valid_split="valid", block_size=64)
    front, text = card(folder, config, FACTS)
    assert front == {
        "library_name": "transformers",
        "base_model": "org/base",
        "tags": ["phalanx", "sft"],
        "pipeline_tag": "text-generation",
    }
    assert "All weights were trained" in text and "`org/base`" in text and "`rows` (local)" in text
    assert "| train | 40 | 2120 | 1138 | 68 | 3 | 2 |" in text
    assert "Dropped from train: 2 (no trained token)." in text and "duplicate" not in text
    assert "lr: 0.001\n" in text and "block_size: 64\n" in text and "epochs" not in text
    assert "| loss | 5.25 | 2 |" in text and "| eval_loss | 5.75 | 4 |" in text
    assert "runtime" not in text and "num_tokens" not in text and "train_loss" not in text
    assert "Cut to block_size: 3 samples of train" in text and "Dropped: 2 of the 40 rows of train" in text
    assert "Safety, bias and truthfulness were not evaluated" in text
    assert "- torch: 1.2.3" in text
    assert "licen" not in str(front)
    assert CANARY not in text and str(tmp_path) not in text and "secret-folder" not in text


def test_the_card_shows_the_evaluation_that_chose_the_model(folder):
    _, text = card(folder, TrainConfig(valid_split="valid", load_best_model_at_end=True), FACTS)
    assert "| eval_loss | 5.5 | 2 |" in text and "The saved model is that of step 2" in text


def test_the_card_claims_nothing_that_was_not_measured(folder):
    (folder / "metrics.jsonl").unlink()
    _, text = card(folder, TrainConfig(data_path="org/rows"), {})
    assert "Nothing was measured" in text and "It was not evaluated" in text
    assert "counts were not recorded" in text
    assert "transformers: " in text


def test_the_card_of_an_adapter_names_no_folder_above_its_base(adapter, tmp_path):
    base = tmp_path / "home" / "base"
    config = TrainConfig(
        model=str(base),
        model_ref=str(base),
        trainer="dpo",
        peft=True,
        quantization="int4",
        data_path="org/rows",
    )
    front, text = card(adapter, config, FACTS)
    assert front["library_name"] == "peft" and front["datasets"] == ["org/rows"]
    assert "base_model" not in front
    assert "LoRA adapters (rank 16, alpha 32)" in text and "quantised to int4" in text
    assert "PeftModel.from_pretrained(base, name)" in text and "'base'" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("trainer", KINDS)
@pytest.mark.parametrize("kind", ["folder", "adapter"])
def test_the_snippet_of_every_trainer_is_valid_python(trainer, kind, request):
    folder = request.getfixturevalue(kind)
    front, text = card(folder, TrainConfig(trainer=trainer, peft=kind == "adapter"), FACTS)
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    loader = {"reward": "AutoModelForSequenceClassification", "mlm": "AutoModelForMaskedLM"}
    assert loader.get(trainer, "AutoModelForCausalLM") in code
    expected = {"reward": "text-classification", "mlm": "fill-mask"}.get(trainer, "text-generation")
    assert front["pipeline_tag"] == expected


def test_the_snippet_loads_the_model(folder, monkeypatch):
    _, text = card(folder, TrainConfig(), FACTS)
    monkeypatch.chdir(folder.parent)
    found: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    assert found["model"].num_parameters() > 0 and len(found["tokenizer"]) == 384


def test_only_the_model_is_uploaded_to_a_private_repository(folder, hub: FakeHub, capsys):
    assert push(pushing(), folder) == f"{hub.endpoint}/me/my-run"
    repository = hub.repositories["me/my-run"]
    assert repository.private and len(repository.commits) == 1
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.jsonl"} <= set(
        repository.files
    )
    assert b"left here\n" not in repository.files.values()
    for name, content in repository.files.items():
        assert content == (folder / name).read_bytes()
    for ending in (CREATE, "/preupload/main", "/objects/batch", COMMIT):
        assert [request.authorization for request in hub.sent(ending)] == [f"Bearer {CANARY}"]
    shown = capsys.readouterr()
    assert f"pushed: {hub.endpoint}/me/my-run" in shown.out and CANARY not in shown.out + shown.err


def test_an_adapter_is_uploaded_without_local_folders(adapter, hub: FakeHub, tmp_path):
    write_card(adapter, pushing(model=str(tmp_path / "home" / "base"), peft=True), FACTS)
    push(pushing(), adapter)
    files = hub.repositories["me/my-run"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert str(tmp_path) in (adapter / "adapter_config.json").read_text()
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_additional_chat_templates_are_uploaded(folder, hub: FakeHub):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    push(pushing(), folder)
    assert "additional_chat_templates/tools.jinja" in hub.repositories["me/my-run"].files


def test_an_existing_repository_gets_another_commit(folder, hub: FakeHub, capsys):
    push(pushing(), folder)
    hub.repositories["me/my-run"].private = False
    push(pushing(), folder)
    assert len(hub.repositories["me/my-run"].commits) == 2
    assert "is public" in capsys.readouterr().out


def test_weights_of_an_earlier_push_are_deleted(adapter, tiny_model, hub: FakeHub):
    """from_pretrained prefers an adapter to a full model."""
    push(pushing(), adapter)
    assert "adapter_model.safetensors" in hub.repositories["me/my-run"].files
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).unlink()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, adapter)
    push(pushing(), adapter)
    files = hub.repositories["me/my-run"].files
    assert "model.safetensors" in files and not any("adapter" in name for name in files)
    assert len(hub.repositories["me/my-run"].commits) == 2, "in the same commit"


@pytest.mark.parametrize("ending", [CREATE, COMMIT])
def test_a_busy_hub_is_tried_again(folder, hub: FakeHub, ending, capsys):
    hub.fail(503, ending, times=2, message=f"busy {CANARY}")
    push(pushing(), folder, AT_ONCE)
    assert len(hub.sent(ending)) == 3 and len(hub.repositories["me/my-run"].commits) == 1
    out = capsys.readouterr().out
    assert out.count("Trying again") == 2 and CANARY not in out


def failing(folder: Path, config: TrainConfig, kind: type[Exception]) -> str:
    """Return the message of a push that must fail. Neither it nor its traceback may contain the token."""
    with pytest.raises(kind) as raised:
        push(config, folder, AT_ONCE)
    assert (config.token or "") not in "".join(traceback.format_exception(raised.value))
    message = str(raised.value)
    assert "\n" not in message
    assert f"The model is safe in {folder}" in message and "hf upload" in message
    return message


def test_a_hub_that_stays_busy_is_an_error(folder, hub: FakeHub):
    hub.fail(503, CREATE)
    message = failing(folder, pushing(), RuntimeError)
    assert "503" in message and "attempt 3" in message and len(hub.sent(CREATE)) == 3


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_a_config_error(folder, hub: FakeHub, status):
    hub.fail(status, message=f"Bearer {CANARY} is no token")
    message = failing(folder, pushing(), ConfigError)
    assert message.startswith("push_to_hub: me/my-run:") and str(status) in message and "(hidden)" in message
    assert len(hub.sent(CREATE)) == 1


def test_a_permanent_error_is_not_tried_again(folder, hub: FakeHub):
    hub.fail(400, COMMIT, message="bad commit")
    message = failing(folder, pushing(), RuntimeError)
    assert "bad commit" in message and len(hub.sent(COMMIT)) == 1


def test_an_address_without_a_hub_is_an_error(folder, monkeypatch):
    from huggingface_hub import constants

    with fake_hub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "ConnectError" in failing(folder, pushing(), RuntimeError)


def test_the_offline_mode_is_a_config_error(folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failing(folder, pushing(), ConfigError)


@pytest.mark.parametrize("name", ["my run", "a--b"])
def test_a_name_that_the_hub_does_not_allow_is_a_config_error(folder, hub: FakeHub, name):
    other = folder.rename(folder.parent / name)
    assert name in failing(other, pushing(), ConfigError)
    assert hub.requests == []


@pytest.mark.parametrize("token", ["two words", "line\nend", "täken"])
def test_a_token_that_cannot_be_sent_is_not_printed(folder, hub: FakeHub, token):
    failing(folder, TrainConfig(username="me", token=token), ConfigError)
    assert hub.requests == []


def test_the_address_is_the_librarys_setting(folder, tmp_path, monkeypatch):
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
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"pushed: {hub.endpoint}/me/my-run" in done.stdout
        assert CANARY not in done.stdout + done.stderr
        assert "model.safetensors" in hub.repositories["me/my-run"].files
