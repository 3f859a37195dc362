"""A run's folder is apart from all that the run reads: before anything starts, and nothing is written."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import contents, fake_checkpoint, fake_model, run_command, write_rows

from launcher.cli import main
from trainers.config.errors import ConfigError
from trainers.config.schema import INPUT_FIELDS, TrainConfig
from trainers.loop import life
from trainers.storage import run_files
from trainers.storage.folder_lock import lock_folder, unlock_folder
from trainers.storage.manifest import MANIFEST
from trainers.storage.run_folder import claim
from trainers.storage.run_place import check_output

CONFIG = """\
task: llm-dpo
base_model: {model}
project_name: {run}
log: none
data:
  path: {data}
  chat_template: {chat_template}
  column_mapping: {{text_column: text, rejected_text_column: text}}
params:
  model_ref: {model_ref}
  lr: 0.001
"""
INPUTS = {"model": "model", "data": "data", "model_ref": "null", "chat_template": "null"}
FLAGS = {"plain": [], "overwrite": ["--overwrite"], "resume": ["--resume"]}
FOLDERS = ("data", "model", "model_ref", "PHALANX_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
OVERLAPS = [(kind, relation) for kind in FOLDERS for relation in ("is", "contains", "inside")]
OVERLAPS += [("list", "contains"), ("chat_template", "contains")]  # files
CHECKPOINT = f"checkpoint-20/{MANIFEST}"
INSIDE = [(mark, "plain") for mark in ("run.json", "launch/jobs.jsonl", ".lock", CHECKPOINT)]
INSIDE += [(".written", flags) for flags in FLAGS]
Train = Callable[..., str]


@pytest.fixture
def refused(
    work: Path,
    hardware: object,
    packages: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Train:
    """`refused("data/run", "--overwrite", data="data")` returns the message of each way to start that run.

    It checks that train, show, submit and a rank by hand say the same, and write nothing.
    """

    def check(run: str, *flags: str, config: str = "c.yaml", array: str | None = None, **inputs: str) -> str:
        values = {**INPUTS, **inputs, "run": run}
        Path(config).parent.mkdir(parents=True, exist_ok=True)
        Path(config).write_text(CONFIG.format(**values))
        commands = [
            ["train", config, *flags],
            ["show", config, *flags],
            ["submit", config, "--dry-run", *flags],
        ]
        if array is not None:
            commands = [["submit", config, "--array", array, "--dry-run", *flags]]
        before, messages = contents(work.parent), []
        for argv in commands:
            assert run_command(argv, monkeypatch) == 2, argv
            messages.append(capsys.readouterr().err)
        if array is None:
            with Path(config).open("a") as file:
                file.writelines(f"  {flag[2:]}: true\n" for flag in flags)
            by_hand = contents(work.parent)
            assert life.run("dpo", lambda context: pytest.fail("it would train"), [config]) == 2
            messages.append("".join(capsys.readouterr()))
            assert contents(work.parent) == by_hand
            Path(config).write_text(CONFIG.format(**values))
        assert contents(work.parent) == before, "something was written"
        found = {
            re.sub(r"^error: |^\S+:\d+: ", "", message.replace("error: ", "")).strip() for message in messages
        }
        assert len(found) == 1, found
        return found.pop()

    return check


def make_input(kind: str, place: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Make an input of a kind at a place, and return what the config or the command must say."""
    if kind in ("model", "model_ref"):
        fake_model(Path(place))
    elif kind == "data":
        write_rows(Path(place) / "train.jsonl", {"text": "a"})
    elif kind == "list":
        write_rows(Path(place) / "sweep.txt").write_text("--lr 1e-4\n")
        return {"array": f"{place}/sweep.txt"}
    elif kind == "chat_template":
        write_rows(Path(place) / "own.jinja").write_text("{{ messages }}")
        return {kind: f"{place}/own.jinja"}
    else:
        Path(place).mkdir(parents=True)
        monkeypatch.setenv(kind, str(Path(place).absolute()))
        return {}
    return {kind: place}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("linked", [False, True], ids=["directly", "through a link"])
@pytest.mark.parametrize(("kind", "relation"), OVERLAPS)
def test_a_folder_that_overlaps_with_an_input_is_refused(
    refused: Train, monkeypatch: pytest.MonkeyPatch, kind: str, relation: str, linked: bool, flags: str
) -> None:
    asked = make_input(kind, "outer/input", monkeypatch)
    run = {"is": "outer/input", "contains": "outer", "inside": "outer/input/run"}[relation]
    if flags != "plain" and relation == "inside":
        claim(Path(run), TrainConfig())
    if linked:
        Path("short").symlink_to("outer")
        run = run.replace("outer", "short", 1)
    message = refused(run, *FLAGS[flags], **asked)
    words = {"is": "is", "contains": "contains", "inside": "lies inside"}[relation]
    assert re.match(rf"(sweep\S+: )?.*project_name: {run} {words} ", message), message
    assert "Give another project_name" in message


@pytest.fixture
def bind() -> Iterator[Callable[[str, str], None]]:
    """`bind("model", "other")` mounts a folder at a second place until the test ends."""
    mounted: list[str] = []

    def mount(folder: str, place: str) -> None:
        Path(place).mkdir(parents=True)
        done = subprocess.run(["mount", "--bind", folder, place], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"bind mounts need root: {done.stderr.strip()}")
        mounted.append(str(Path(place).absolute()))

    yield mount
    for place in reversed(mounted):
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("bound", "run", "relation"),
    [
        ("outer/input", "bound", "is"),
        ("outer/input", "bound/run", "lies inside"),
        ("outer/input/inner", "bound", "lies inside"),
        ("outer/input/inner", "bound/run", "lies inside"),
        ("outer", "bound", "contains"),
        ("outer", "bound/input", "is"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "data"])
def test_an_input_under_a_second_name_is_refused(
    refused: Train,
    bind: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bound: str,
    run: str,
    relation: str,
) -> None:
    asked = make_input(kind, "outer/input", monkeypatch)
    Path("outer/input/inner").mkdir()
    bind(bound, "bound")
    if run == "bound/run":
        claim(Path(run), TrainConfig())
    assert f"project_name: {run} {relation} " in refused(run, "--overwrite", **asked)


def test_a_folder_next_to_a_bind_mount_is_accepted(
    accepted: Callable[..., None], bind: Callable[[str, str], None]
) -> None:
    bind("model", "bound")
    accepted("my", model="bound")


@pytest.mark.parametrize("kind", ["model", "data"])
def test_an_input_whose_files_are_links_into_the_folder_is_refused(refused: Train, kind: str) -> None:
    """Such a folder has no weights of its own: --overwrite would remove them."""
    fake_model(Path("my"))
    write_rows(Path("my/train.jsonl"), {"text": "a"})
    Path("view").mkdir()
    for path in Path("my").iterdir():
        (Path("view") / path.name).symlink_to(path.absolute())
    assert "contains files of" in refused("my", "--overwrite", **{kind: "view"})


@pytest.mark.parametrize(("mark", "flags"), INSIDE)
def test_a_folder_inside_another_run_s_folder_is_refused(
    refused: Train, accepted: Callable[..., None], mark: str, flags: str
) -> None:
    """That run deletes it with a checkpoint, with `saving`, or with --overwrite."""
    outer = Path("runs/one")
    inner = outer / "checkpoint-20" / "deep"
    inner.mkdir(parents=True)
    if flags != "plain":
        claim(inner, TrainConfig())
        fake_checkpoint(inner, 2)
    accepted(str(inner), *FLAGS[flags])  # the folders around it only have names of a run
    if mark == ".written":
        run_files.begin(outer, of_earlier_version=False)
    elif mark == "run.json":
        (outer / mark).write_text('{"config": {}, "versions": {}}')
    elif mark == ".lock":
        lock_folder(outer)
    else:
        write_rows(outer / mark)
    Path("short").symlink_to(outer)
    owner = ((outer / mark).parent if mark == CHECKPOINT else outer).resolve()
    try:
        for run in (inner, Path("short/checkpoint-20/deep")):
            message = refused(str(run), *FLAGS[flags])
            assert f"project_name: {run} lies inside {owner}, which belongs to another run" in message
    finally:
        unlock_folder()


def test_runs_next_to_each_other_in_a_folder_are_accepted(accepted: Callable[..., None]) -> None:
    claim(Path("runs/one"), TrainConfig())
    accepted("runs/two")


@pytest.mark.parametrize("run", ["home", "home/deeper"])
@pytest.mark.parametrize("flags", FLAGS)
def test_the_home_folder_and_its_parents_are_refused(
    refused: Train, monkeypatch: pytest.MonkeyPatch, run: str, flags: str
) -> None:
    Path("home/deeper").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(Path("home/deeper").absolute()))
    assert "home folder" in refused(run, *FLAGS[flags])


@pytest.mark.parametrize("run", [".", "..", "/", "../work", "{parent}"])
def test_a_rank_by_hand_refuses_the_working_folder_and_its_parents(
    work: Path, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    """The launcher refuses them too: they are not inside the working folder (test_bad_input.py)."""
    run = run.format(parent=work.parent)
    Path("c.yaml").write_text(CONFIG.format(**INPUTS, run=run))
    before = contents(work.parent)
    assert life.run("dpo", lambda context: pytest.fail("it would train"), ["c.yaml"]) == 2
    assert "or contains it. Give a folder of its own" in capsys.readouterr().err
    assert contents(work.parent) == before


def test_a_hub_model_with_the_name_of_the_run_is_refused(refused: Train) -> None:
    """Libraries would take the run's folder for the model when the run starts again."""
    assert "project_name: gpt2 is base_model" in refused("gpt2", model="gpt2")


@pytest.fixture
def accepted(
    work: Path, hardware: object, packages: object, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """`accepted("my", "--overwrite", model=...)` checks that the dry run of this config is accepted."""

    def check(run: str, *flags: str, config: str = "c.yaml", **inputs: str) -> None:
        Path(config).parent.mkdir(parents=True, exist_ok=True)
        values = {**INPUTS, **inputs, "run": run}
        Path(config).write_text(CONFIG.format(**values))
        assert run_command(["show", config, *flags], monkeypatch) == 0

    return check


def test_a_checkpoint_of_another_run_may_be_the_base_model(accepted: Callable[..., None]) -> None:
    fake_model(Path("my/checkpoint-2"))
    accepted("my2", model="my/checkpoint-2")


@pytest.mark.parametrize("flags", FLAGS)
def test_a_checkpoint_of_the_run_itself_may_not_be_the_base_model(refused: Train, flags: str) -> None:
    fake_model(Path("my/checkpoint-2"))
    message = refused("my", *FLAGS[flags], model="my/checkpoint-2")
    assert "project_name: my contains base_model (my/checkpoint-2)" in message


def test_a_run_may_resume_from_its_own_checkpoint_and_from_another_run_s(
    accepted: Callable[..., None],
) -> None:
    fake_checkpoint(Path("my"), 2)
    accepted("my", "--resume", "my/checkpoint-2")
    accepted("my2", "--resume", "my/checkpoint-2")


def test_a_run_may_not_resume_from_a_checkpoint_that_is_its_folder(refused: Train, work: Path) -> None:
    fake_checkpoint(Path("my"), 2)
    for run in ("my/checkpoint-2", "my/checkpoint-2/run"):
        Path("c.yaml").write_text("")
        assert "resume" in _message_of_train(run, "--resume", "my/checkpoint-2")


def _message_of_train(run: str, *flags: str) -> str:
    from trainers.config.errors import ConfigError
    from trainers.storage.run_place import check_place

    with pytest.raises(ConfigError) as error:
        check_place(Path(run), TrainConfig(project_name=run, resume=flags[1]))
    return str(error.value)


def test_the_config_file_may_be_in_the_folder(accepted: Callable[..., None]) -> None:
    accepted("my", config="my/config.yaml")


@pytest.mark.parametrize(
    "name", ["config.json", "run.json", "launch/c.yaml", "checkpoint-1/c.yaml", "wandb/c.yaml"]
)
@pytest.mark.parametrize("flags", FLAGS)
def test_a_config_file_under_a_name_that_runs_write_is_refused(refused: Train, name: str, flags: str) -> None:
    Path("my").mkdir()
    message = refused("my", *FLAGS[flags], config=f"my/{name}")
    assert f"contains the config file my/{name}, under a name that runs write" in message


def test_a_run_may_be_inside_hugging_face_s_folder_if_the_working_folder_is(
    accepted: Callable[..., None], monkeypatch: pytest.MonkeyPatch, work: Path
) -> None:
    """HF_HOME is a person's whole scratch folder on many clusters."""
    monkeypatch.setenv("HF_HOME", str(work.parent))
    monkeypatch.setenv("PHALANX_CACHE", str(work.parent))
    accepted("run")


def test_every_field_that_names_a_file_is_an_input() -> None:
    """A field that is described as a path is an input, unless it is the run's own folder."""
    described = {
        name
        for name, field in TrainConfig.model_fields.items()
        if re.search(r"\b(folder|file|path|model\.)\b", field.description or "", re.I)
    }
    not_inputs = {"project_name", "token", "trust_remote_code"}
    assert set(INPUT_FIELDS) <= set(TrainConfig.model_fields)
    assert described - not_inputs <= set(INPUT_FIELDS), described - not_inputs - set(INPUT_FIELDS)


def test_submit_checks_each_run_of_an_array(
    work: Path, hardware: object, packages: object, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(CONFIG.format(**INPUTS, run="run"))
    Path("sweep.txt").write_text("--project-name one\n--project-name data/two\n")
    assert main(["submit", "c.yaml", "--array", "sweep.txt", "--dry-run"]) == 2
    assert "sweep.txt:2: " in (message := capsys.readouterr().err) and "lies inside data.path" in message


@pytest.mark.parametrize("recorded", [True, False], ids=["with a record", "of an earlier version"])
def test_another_command_writes_to_no_place_of_a_run_or_a_checkpoint(work: Path, recorded: bool) -> None:
    run, alone = Path("my-run"), Path("copies")
    fake_checkpoint(run, 5)
    if recorded:
        run_files.begin(run, of_earlier_version=True)
        run_files.own(run, "extra/")
    fake_checkpoint(alone, 5).rename(alone / "my-checkpoint-5")
    Path("link").symlink_to(run)
    refused = [
        "launch",
        "launch/x",
        "launch/attempt-1/x",
        "checkpoint-5",
        "checkpoint-5/x",
        "checkpoint-9/x/y",
    ]
    refused += ["saving/x", "wandb/x", "set-aside-1-checkpoint-5", "model.safetensors"]
    refused += ["extra/x"] if recorded else []
    for name in refused:
        for output in (run / name, Path("link") / name):
            with pytest.raises(ConfigError, match=r"belongs to the run in|is inside the checkpoint"):
                check_output(output)
    with pytest.raises(ConfigError, match=f"is inside the checkpoint {work / alone}/my-checkpoint-5"):
        check_output(alone / "my-checkpoint-5" / "x")
    for output in (run / "checkpoint-5-model", run / "mine", Path("elsewhere/launch"), Path("link") / "mine"):
        check_output(output)
