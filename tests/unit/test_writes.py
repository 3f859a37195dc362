"""Only no_links.py writes into a run's folder: every other call that writes to a disk is listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import REPO

HELPER = "trainers/rank/no_links.py"
# Where else a call may write, and to what. A new one belongs here only if its target is not in a run's
# folder, or in a fresh folder there (run_files.fresh_folder).
ELSEWHERE = {
    ("launcher/supervise/hangs.py", "rmtree"): "heartbeats, in the machine's folder for temporary files",
    ("launcher/supervise/hangs.py", "mkdtemp"): "the same",
    ("launcher/supervise/supervisor.py", "rmtree"): "the same",
    ("launcher/supervise/supervisor.py", "unlink"): "the same",
    ("trainers/rank/heartbeat.py", "open"): "the same",
    ("trainers/rank/terminal.py", "open"): "/dev/null",
    ("launcher/supervise/machines.py", "unlink"): "the mark in the cache of prepared data",
    ("launcher/supervise/machines.py", "touch"): "the same",
    ("launcher/supervise/stale_locks.py", "unlink"): "the cache of torch's extensions",
    ("trainers/storage/data_cache.py", "mkdir"): "the cache of prepared data",
    ("trainers/storage/data_cache.py", "rmtree"): "the same",
    ("trainers/storage/data_cache.py", "rename"): "the same",
    ("trainers/storage/data_cache.py", "open"): "the same",
    ("trainers/storage/data_cache.py", "write_text"): "the same",
    ("trainers/data/prepare.py", "save_to_disk"): "the same",
    ("trainers/data/prepare.py", "save"): "the same",
    ("trainers/data/prepare.py", "write_text"): "the same",
    ("trainers/data/prepare.py", "rmtree"): "the same",
    ("trainers/data/mixing.py", "save_to_disk"): "the same",
    ("trainers/data/mixing.py", "rmtree"): "the same",
    ("trainers/rank/private_socket.py", "unlink"): "the socket of --keep",
    ("trainers/rank/private_socket.py", "chmod"): "the same",
    ("trainers/model/deepspeed_builds.py", "write_text"): "the cache of torch's extensions",
    ("trainers/storage/manifest.py", "open"): "a fresh folder in saving/",
    ("trainers/checkpoint/saving.py", "save_pretrained"): "the same",
    ("trainers/checkpoint/saving.py", "save_to_json"): "the same",
    ("trainers/checkpoint/saving.py", "save"): "the same",
    ("trainers/checkpoint/saving.py", "unlink"): "the same",
    ("trainers/checkpoint/saving.py", "save_model"): "the same, or the fresh folder of save_final_model",
    ("trainers/checkpoint/zero_shards.py", "write_text"): "a fresh folder in saving/",
    ("trainers/checkpoint/zero_shards.py", "save"): "the same",
    ("trainers/checkpoint/zero_shards.py", "save_checkpoint"): "the same",
    ("trainers/checkpoint/fsdp_shards.py", "async_save"): "the same",
    ("trainers/loop/finish.py", "save_model"): "the fresh folder of the final model",
    ("trainers/loop/finish.py", "save_pretrained"): "the same",
    ("trainers/loop/finish.py", "save_to_json"): "the same",
    ("trainers/output/merge.py", "save_pretrained"): "the fresh folder of the merged model",
    ("trainers/consolidate.py", "copyfile"): "the fresh folder of the exported model",
    ("trainers/consolidate.py", "save_file"): "the same",
    ("trainers/consolidate.py", "write_text"): "the same",
    ("trainers/output/trackers.py", "SummaryWriter"): "runs/, which run_files.make_folder has checked",
}
WRITERS = {
    "write_text", "write_bytes", "touch", "mkdir", "makedirs", "unlink", "rmdir", "removedirs",
    "rename", "renames", "symlink_to", "hardlink_to", "chmod", "lchmod", "rmtree", "copyfile",
    "copy2", "copytree", "move", "mkdtemp", "mkstemp", "NamedTemporaryFile", "save_pretrained",
    "save_model", "save_state", "save_to_json", "save_file", "save_to_disk", "save_checkpoint",
    "async_save", "serialize_file", "to_json_file", "to_csv", "to_parquet", "SummaryWriter",
}  # fmt: skip
# These names are also those of harmless functions. They count for these modules only.
OF_MODULE = {
    "os": {"replace", "remove", "symlink", "link", "truncate", "mkfifo"},
    "torch": {"save"},
    "shutil": {"copy"},
    "np": {"save", "savez"},
}
OURS = {"no_links", "run_files"}


def writes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the calls that write to a disk: name and line."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        base = called.value if isinstance(called, ast.Attribute) else None
        module = base.id if isinstance(base, ast.Name) else ""
        is_super = isinstance(base, ast.Call) and getattr(base.func, "id", "") == "super"
        if module in OURS:
            continue
        if (
            name in WRITERS
            or name in OF_MODULE.get(module, ())
            or (name == "save" and is_super)
            or (name == "open" and _may_write(node, module))
            or (name == "replace" and module != "os" and len(node.args) == 1 and not node.keywords)
        ):
            yield name, node.lineno


def _may_write(node: ast.Call, module: str) -> bool:
    """Whether an open() may write: its mode or its flags are not known to be those of a read."""
    if module == "os":
        return (
            "O_WRONLY" in ast.unparse(node) or "O_RDWR" in ast.unparse(node) or "O_CREAT" in ast.unparse(node)
        )
    place = 0 if isinstance(node.func, ast.Attribute) else 1
    named = [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
    given = [*named, *node.args[place : place + 1]]
    return any(
        not isinstance(mode, ast.Constant) or str(mode.value)[:1] != "r" or "+" in str(mode.value)
        for mode in given
    )


def modules() -> list[Path]:
    return [path for folder in ("launcher", "trainers") for path in sorted((REPO / folder).rglob("*.py"))]


def test_only_the_helper_writes_into_the_folder_of_a_run() -> None:
    found = {
        (str(path.relative_to(REPO)), name): line
        for path in modules()
        for name, line in writes(ast.parse(path.read_text(encoding="utf-8")))
    }
    other = {
        f"{file}:{line}: {name}" for (file, name), line in found.items() if (file, name) not in ELSEWHERE
    }
    other = {place for place in other if not place.startswith(HELPER)}
    assert not other, (
        "write with no_links or run_files, or say in ELSEWHERE why the target is not in a run's folder"
    )
    assert ELSEWHERE.keys() <= found.keys(), f"these do not exist any more: {ELSEWHERE.keys() - found.keys()}"


@pytest.mark.parametrize(
    "line",
    [
        'path.write_text("a")',
        'path.open("w")',
        'open(path, "ab")',
        "open(path, mode)",
        'open(path, mode="r+")',
        "path.touch()",
        "path.unlink(missing_ok=True)",
        "path.replace(other)",
        "os.replace(a, b)",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "shutil.rmtree(path)",
        "tokenizer.save_pretrained(folder)",
        "torch.save(value, path)",
    ],
)
def test_the_check_sees_every_way_to_write(line: str) -> None:
    assert list(writes(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        'path.open("rb")',
        "open(path)",
        'text.replace("a", "b")',
        "no_links.write(a, b, c)",
        "path.read_text()",
    ],
)
def test_the_check_lets_reads_pass(line: str) -> None:
    assert not list(writes(ast.parse(line)))
