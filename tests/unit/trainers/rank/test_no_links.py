"""Nothing outside a folder changes, whatever in the folder is a link."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import contents

from trainers.rank import no_links
from trainers.rank.no_links import LinkFound

Act = Callable[[Path, Path], object]
ACTS: dict[str, Act] = {
    "open to write": lambda root, path: no_links.open_file(root, path, "w").close(),
    "open to append": lambda root, path: no_links.open_file(root, path, "ab").close(),
    "open to lock": lambda root, path: no_links.open_file(root, path, "a+").close(),
    "write": lambda root, path: no_links.write(root, path, "new"),
    "make a folder": no_links.make_folder,
    "remove": no_links.remove,
    "rename": lambda root, path: no_links.rename(root, path, root / "renamed"),
    "rename onto": lambda root, path: no_links.rename(root, root / "other", path),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a file, next to a folder `outside` with a file and a folder."""
    (tmp_path / "outside" / "deeper").mkdir(parents=True)
    (tmp_path / "outside" / "file").write_text("theirs")
    (tmp_path / "outside" / "deeper" / "name").write_text("theirs too")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "other").write_text("ours")
    return tmp_path / "root"


@pytest.mark.parametrize("target", ["file", "deeper", "missing"])
@pytest.mark.parametrize("act", ACTS)
def test_a_link_is_refused_or_replaced_but_not_followed(root: Path, act: str, target: str) -> None:
    before = contents(root.parent / "outside")
    (root / "link").symlink_to(f"../outside/{target}")
    try:
        ACTS[act](root, root / "link")
    except LinkFound as error:
        assert str(error).startswith(f"project_name: {root / 'link'} is a link")
        assert (root / "link").is_symlink(), "a link that is refused stays"
    assert contents(root.parent / "outside") == before


@pytest.mark.parametrize("act", [act for act in ACTS if act not in ("make a folder", "open to lock")])
def test_a_hard_link_is_not_written_through(root: Path, act: str) -> None:
    (root / "name").hardlink_to(root.parent / "outside" / "file")
    before = contents(root.parent / "outside")
    ACTS[act](root, root / "name")
    if act.startswith("open"):
        with no_links.open_file(root, root / "name", "a") as file:
            file.write(" ours")
        assert (root / "name").read_text() == ("theirs ours" if act == "open to append" else " ours")
    assert contents(root.parent / "outside") == before


def test_a_part_that_is_a_hard_link_is_replaced(root: Path) -> None:
    (root / ".name.part").hardlink_to(root.parent / "outside" / "file")
    no_links.write(root, root / "name", "new")
    assert (root / "name").read_text() == "new"
    assert (root.parent / "outside" / "file").read_text() == "theirs"


@pytest.mark.parametrize("act", ACTS)
def test_a_folder_in_between_that_is_a_link_is_refused(root: Path, act: str) -> None:
    before = contents(root.parent / "outside")
    (root / "link").symlink_to("../outside")
    with pytest.raises(LinkFound, match="link is a link"):
        ACTS[act](root, root / "link" / "deeper" / "name")
    assert contents(root.parent / "outside") == before


def test_links_inside_a_folder_that_is_removed_are_not_followed(root: Path) -> None:
    before = contents(root.parent / "outside")
    (root / "folder").mkdir()
    (root / "folder" / "to a folder").symlink_to("../../outside")
    (root / "folder" / "to a file").symlink_to("../../outside/file")
    no_links.remove(root, root / "folder")
    assert not (root / "folder").exists() and contents(root.parent / "outside") == before


def test_a_part_that_is_a_link_is_replaced(root: Path) -> None:
    """A killed process leaves such a part. Someone may have put a link in its place."""
    (root / ".name.part").symlink_to("../outside/file")
    no_links.write(root, root / "name", "new")
    assert (root / "name").read_text() == "new" and not (root / "name").is_symlink()
    assert (root.parent / "outside" / "file").read_text() == "theirs"


def test_the_root_itself_may_be_a_link(root: Path) -> None:
    (root.parent / "short").symlink_to("root")
    no_links.write(root.parent / "short", root.parent / "short" / "a" / "b", "new")
    assert (root / "a" / "b").read_text() == "new"


def test_a_path_outside_the_root_is_an_error(root: Path) -> None:
    for path in (root / ".." / "outside" / "file", root.parent / "outside" / "file"):
        with pytest.raises(ValueError):
            no_links.remove(root, path)


def test_what_does_not_exist_can_be_removed(root: Path) -> None:
    no_links.remove(root, root / "nothing")
    no_links.remove(root, root / "nothing" / "deeper")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_of_new_files(root: Path, umask: int) -> None:
    (root / "other").chmod(0o600)
    before = os.umask(umask)
    try:
        no_links.follow_umask(root)
    finally:
        os.umask(before)
    assert (root / "other").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("again", [False, True], ids=["nothing is there", "another folder is there"])
@pytest.mark.parametrize("act", ACTS)
def test_nothing_is_written_to_the_old_name_of_a_folder_that_was_moved(
    root: Path, monkeypatch: pytest.MonkeyPatch, act: str, again: bool
) -> None:
    monkeypatch.setattr(no_links, "_held", {})
    monkeypatch.chdir(root.parent)
    no_links.hold(root)
    no_links.write(root, root / "more", "ours")
    root.rename(root.with_name("moved"))
    if again:
        root.mkdir()
    before = contents(root.parent)
    for name in (root, Path("root")):
        with pytest.raises(no_links.FolderMoved, match=f"{root} was moved or removed"):
            ACTS[act](name, name / "other")
    assert contents(root.parent) == before
