"""The record of what a run wrote: --overwrite removes that and nothing else, through no link."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from fakes import NAMES_OF_RUNS, contents, fake_checkpoint

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.storage import folder_lock, run_files
from trainers.storage.folder_lock import lock_folder
from trainers.storage.run_folder import claim

OVERWRITE = TrainConfig(overwrite=True)
RUN_JSON = json.dumps({"config": {}, "versions": {}})


def fill(run: Path, name: str, text: str = "{}") -> None:
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        path.mkdir()
        path /= "content"
    path.write_text(text)


def make_run(run: Path, recorded: bool = True) -> Path:
    """Write all that runs write, and the record of it."""
    for name in NAMES_OF_RUNS:
        fill(run, name, RUN_JSON)
    if recorded:
        listed = [name for name in NAMES_OF_RUNS if name not in run_files.SHARED]
        (run / run_files.WRITTEN).write_text("".join(f"{name}\n" for name in listed))
    else:
        (run / run_files.WRITTEN).unlink()
    return run


THEIRS = ("other.safetensors", "set-aside-mine/", "notes.txt", "checkpoint-old/", "launch/mine.txt", "mine/")


@pytest.mark.parametrize("recorded", [True, False], ids=["with a record", "of an earlier version"])
def test_overwrite_removes_what_a_run_wrote_and_nothing_else(
    tmp_path: Path, recorded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", recorded)
    for name in THEIRS:
        fill(run, name, "theirs")
    claim(run, OVERWRITE)
    # The folders of trackers may have what no run wrote. Without a record they stay.
    kept = [*THEIRS] if recorded else [*THEIRS, "runs/", "wandb/"]
    left = {name for name in contents(run) if "/content" not in name} - {".lock", ".written", "launch"}
    assert left == {name.removesuffix("/") for name in kept}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "overwrite" in line]
    assert all(name.removesuffix("/") in line for name in kept)


def test_a_second_overwrite_still_knows_what_is_not_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    fill(run, "notes.txt", "theirs")
    claim(run, OVERWRITE)
    run_files.write(run, "run.json", "{}")
    claim(run, OVERWRITE)
    assert sorted(contents(run)) == [".lock", ".written", "launch", "notes.txt"]


def test_overwrite_leaves_the_journal_of_jobs_and_the_files_of_other_machines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in (run_files.JOBS, f"{run_files.MACHINES}/member-1.json"):
        fill(run, name)
    claim(run, OVERWRITE)
    assert (run / run_files.JOBS).exists() and (run / run_files.MACHINES / "member-1.json").exists()


@pytest.mark.parametrize("config", [TrainConfig(), OVERWRITE], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    "there",
    [
        "notes.txt",
        "config.json",
        "mine/",
        "launch/mine.txt",
        "README.md",
        "launch/my.log",
        "log/",
        "log.json",
    ],
)
def test_a_folder_with_files_that_no_run_wrote_is_refused(
    tmp_path: Path, there: str, config: TrainConfig
) -> None:
    fill(tmp_path / "run", there, "theirs")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"run has {there.removesuffix('/')}, which no run wrote"):
        claim(tmp_path / "run", config)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("config", [OVERWRITE, TrainConfig(resume=True)], ids=["overwrite", "resume"])
def test_checkpoints_of_another_program_are_not_a_run(tmp_path: Path, config: TrainConfig) -> None:
    fill(tmp_path / "run", "checkpoint-5/model.safetensors")
    with pytest.raises(ConfigError, match="checkpoint-5, which no run wrote"):
        claim(tmp_path / "run", config)


@pytest.mark.parametrize("there", ["run.json", "launch/attempt-1/command.txt", "checkpoint-5"])
def test_a_run_of_an_earlier_version_is_recognised(tmp_path: Path, there: str) -> None:
    run = tmp_path / "run"
    if there == "checkpoint-5":
        fake_checkpoint(run, 5)
    else:
        fill(run, there, RUN_JSON)
    claim(run, OVERWRITE)
    assert set(contents(run)) <= {".written", "launch"}


def test_only_the_config_file_may_be_in_a_new_run_s_folder(tmp_path: Path) -> None:
    fill(tmp_path / "run", "config.yaml", "task: llm-sft")
    with pytest.raises(ConfigError, match=r"config\.yaml, which no run wrote"):
        claim(tmp_path / "run", TrainConfig())
    claim(tmp_path / "run", TrainConfig(), tmp_path / "run" / "config.yaml")
    run_files.write(tmp_path / "run", "run.json", "{}")
    claim(tmp_path / "run", OVERWRITE, tmp_path / "run" / "config.yaml")
    assert sorted(contents(tmp_path / "run")) == [".written", "config.yaml"]


@pytest.mark.parametrize("log", ["log", "log.txt", "7.log", "slurm-7_1.out", "train.err"])
def test_the_output_of_a_run_may_be_in_its_folder(tmp_path: Path, log: str) -> None:
    """`phalanx train c.yaml | tee my-run/log`, `sbatch --output=my-run/%j.log` create it before a run."""
    run = tmp_path / "run"
    fill(run, log, "a line\n")
    assert not run_files.is_name_of_run(log)
    for config in (TrainConfig(), OVERWRITE, OVERWRITE):
        claim(run, config)
        for name in NAMES_OF_RUNS:
            if name not in run_files.SHARED:
                replace(run, name)
    claim(run, OVERWRITE)
    assert (run / log).read_text() == "a line\n" and log in run_files.foreign(run)


def test_a_link_with_the_name_of_a_log_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "outside", "theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="log, which no run wrote"):
        claim(tmp_path / "run", TrainConfig())


def test_a_name_is_listed_before_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    claim(tmp_path / "run", TrainConfig())
    monkeypatch.setattr(run_files.no_links, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run_files.write(tmp_path / "run", "run.json", "{}")
    assert run_files.owns(tmp_path / "run", "run.json") and not (tmp_path / "run" / "run.json").exists()


def test_a_file_of_the_user_is_renamed_and_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    claim(run, TrainConfig())
    fill(run, "README.md", "their notes")
    for _ in range(2):
        run_files.write(run, "README.md", "the card")
    assert (run / "README.md").read_text() == "the card"
    assert (run / "README.md.kept-1").read_text() == "their notes" and not (run / "README.md.kept-2").exists()
    assert "README.md is not of this run" in capsys.readouterr().out
    claim(run, OVERWRITE)
    assert (run / "README.md.kept-1").exists()


@pytest.mark.parametrize("line", ["../outside", "/etc", "a/../../outside", "", ".", "./", "launch/../.."])
def test_a_line_of_the_record_that_leads_out_of_the_folder_is_ignored(tmp_path: Path, line: str) -> None:
    fill(tmp_path, "outside", "theirs")
    claim(tmp_path / "run", TrainConfig())
    (tmp_path / "run" / run_files.WRITTEN).write_text(f"{line}\n")
    claim(tmp_path / "run", OVERWRITE)
    assert (tmp_path / "outside").exists() and (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["a folder", "not text"])
@pytest.mark.parametrize("config", [OVERWRITE, TrainConfig(resume=True)], ids=["overwrite", "resume"])
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, damage: str, config: TrainConfig) -> None:
    run = make_run(tmp_path / "run")
    path = run / run_files.WRITTEN
    path.unlink()
    path.mkdir() if damage == "a folder" else path.write_bytes(b"run.json\n\xff\n")
    before = contents(run)
    with pytest.raises(ConfigError) as raised:
        claim(run, config)
    why = "Is a directory" if damage == "a folder" else "line 2 is not UTF-8"
    assert str(raised.value).startswith(f"{path} is damaged: {why}. Restore it from a copy, or remove it")
    assert contents(run) == before


def test_a_full_disk_names_the_file_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write to an open file names none."""
    monkeypatch.setattr(run_files, "own", lambda *_: None)
    full = partial(open, "/dev/full", "a")
    monkeypatch.setattr(run_files.no_links, "open_file", lambda *_: full())
    for act in (run_files.append, run_files.write):
        with pytest.raises(OSError) as raised:
            act(tmp_path, "metrics.jsonl", "a line\n")
        assert raised.value.filename == str(tmp_path / "metrics.jsonl")


def write(run: Path, name: str) -> None:
    """Write a name as a run does: the functions for its kind, one after the other."""
    if name.endswith("/"):
        run_files.make_folder(run, name[:-1])
        run_files.fresh_folder(run, name[:-1])
    elif name == run_files.LOCK:
        lock_folder(run)
    else:
        run_files.append(run, name, "")


def replace(run: Path, name: str) -> None:
    """Replace a name as a run does: by one write, or by a move from the fresh folder of a library."""
    if name in run_files.SHARED:
        lock_folder(run)
        run_files.own(run, "anything")
    elif name.startswith("launch/"):
        run_files.write(run, name.removesuffix("/"), "new")
    else:
        fill(run_files.fresh_folder(run, "part"), name, "new")
        run_files.move_in(run, "part")


def overwrite(run: Path, name: str) -> None:
    claim(run, OVERWRITE)


@pytest.mark.parametrize("act", [write, replace, overwrite])
@pytest.mark.parametrize("target", ["file", "folder", "missing"])
@pytest.mark.parametrize("name", [*NAMES_OF_RUNS, "launch/"])
def test_no_link_in_the_place_of_a_run_s_file_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: str, act: Callable[[Path, str], None]
) -> None:
    """It is refused by name, or replaced, or renamed: nothing outside the folder changes."""
    monkeypatch.setattr(folder_lock, "_held", [])  # the locks of this test end with it
    run = make_run(tmp_path / "run")
    fill(tmp_path / "outside", "file", "theirs")
    for inside in ("folder/content", "folder/attempt-1/command.txt", "folder/progress.json"):
        fill(tmp_path / "outside", inside, "theirs")
    before = contents(tmp_path / "outside")
    path = run / name
    run_files.remove(run, name.removesuffix("/"))
    path.symlink_to(tmp_path / "outside" / target, target_is_directory=True)
    try:
        act(run, name)
    except ConfigError as error:
        assert f"{path} is a link" in str(error)
    assert contents(tmp_path / "outside") == before


@pytest.mark.parametrize("act", [write, replace, overwrite])
@pytest.mark.parametrize("name", [name for name in NAMES_OF_RUNS if name[-1] != "/"])
def test_no_hard_link_in_the_place_of_a_run_s_file_is_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Path, str], None]
) -> None:
    """The name gets a file of its own. `cp -al my-run copy` makes such links of all files of a run."""
    monkeypatch.setattr(folder_lock, "_held", [])  # the locks of this test end with it
    run = make_run(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.hardlink_to(run / name)
    outside.chmod(0o600)
    before = outside.read_bytes()
    act(run, name)
    assert outside.read_bytes() == before and outside.stat().st_mode & 0o777 == 0o600
    written = (run / name).stat() if (run / name).exists() else None
    assert act is overwrite or (written and written.st_nlink == 1) or name in run_files.SHARED


def test_a_copy_of_hard_links_continues_a_file_that_is_appended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    fill(run, "metrics.jsonl", "one\n")
    (tmp_path / "metrics.jsonl").hardlink_to(run / "metrics.jsonl")
    for line in ("two\n", "three\n"):
        run_files.append(run, "metrics.jsonl", line)
    assert (run / "metrics.jsonl").read_text() == "one\ntwo\nthree\n"
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n"


def test_a_lock_that_is_a_hard_link_still_locks_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[folder_lock.Lock] = []
    monkeypatch.setattr(folder_lock, "_held", held)
    run = make_run(tmp_path / "run")
    copy = make_run(tmp_path / "copy")
    run_files.remove(copy, run_files.LOCK)
    (copy / run_files.LOCK).hardlink_to(run / run_files.LOCK)
    lock_folder(run)
    lock_folder(copy)
    for folder in (run, copy):
        with pytest.raises(folder_lock.InUse):
            lock_folder(folder)
    assert len(held) == 2
