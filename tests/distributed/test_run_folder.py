"""The folder of a real run: all its files are in its record, and nothing else is touched."""

from __future__ import annotations

import re
import shutil

from fakes import NAMES_OF_RUNS, contents
from ranks import BACKENDS

from trainers.storage import run_files


def test_a_finished_run_has_a_record_of_all_its_files(trained):
    folder = trained("one", "full").folder
    assert run_files.foreign(folder) == []
    found = {f"{name}/" if (folder / name).is_dir() else name for name in run_files.entries(folder)}
    assert {re.sub(r"\d+", "1", name) for name in found} <= {
        re.sub(r"\d+", "1", name) for name in NAMES_OF_RUNS
    }


def test_every_file_of_a_run_has_the_same_mode(trained):
    folder = trained("one", "full").folder
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_an_overwrite_follows_no_link_and_leaves_what_no_run_wrote(trained, bench):
    folder, outside = bench.root / "linked", bench.root / "outside"
    shutil.copytree(trained("one", "full").folder, folder)
    outside.mkdir()
    for name in run_files.entries(folder):
        if "/" not in name and name not in run_files.SHARED:
            (folder / name).rename(outside / name)
            (folder / name).symlink_to(outside / name)
    (folder / "notes.txt").write_text("mine")
    before = contents(outside)
    run = bench.train("linked", *BACKENDS["one"], "--max-steps", "1", "--overwrite")
    assert run.code == 0, run.err
    assert contents(outside) == before
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert "linked keeps notes.txt, which the earlier run did not write" in run.out
    assert [entry["step"] for entry in run.metrics if "loss" in entry] == [1]
    assert run_files.foreign(folder) == ["notes.txt"]
