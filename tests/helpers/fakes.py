"""Fake hardware, model folders, runs and checkpoints; rows; and running a command."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from launcher.plan.topology import Gpu, Hardware
from launcher.supervise import supervisor
from trainers.storage.identity import ID, RECORD
from trainers.storage.manifest import CHECKPOINT_PREFIX, Layout, Manifest, entry_of
from trainers.storage.run_folder import PROGRESS

GIB = 2**30


def machine(
    gpus: int = 0, gib: int = 80, capability: tuple[int, int] = (9, 0), cpu_bf16: bool = True
) -> Hardware:
    """Return fake hardware, with eight cores and 16 GiB of host memory."""
    cards = tuple(Gpu(f"card {index}", gib * GIB, capability) for index in range(gpus))
    return Hardware(gpus=cards, memory=16 * GIB, cores=8, cpu_bf16=cpu_bf16)


def fake_model(folder: Path, parameters: int = 1000) -> Path:
    """Write what the launcher reads from a model: a config, and a weights header with `parameters`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    header = json.dumps({"w": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def fake_checkpoint(
    run: Path,
    step: int,
    layout: Layout | None = None,
    config: dict[str, Any] | None = None,
    run_id: str = "",
) -> Path:
    """Write a checkpoint that verifies, with two small files. Default layout: two ranks of ddp.

    An id of the run is also written to run.json, unless there is one.
    """
    folder = run / f"{CHECKPOINT_PREFIX}{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"the weights")
    (folder / "trainer_state.json").write_bytes(b"{}")
    files = [entry_of(folder, path) for path in sorted(folder.iterdir())]
    position = {"epoch": 0.5, "data_seed": 42, "evaluation_due": False}
    layout = layout or Layout("ddp", None, 2, batch_size=2, gradient_accumulation=4)
    manifest = Manifest(
        step, layout, position, {"torch": "2.10"}, "the rows", files, config=config, run=run_id
    )
    manifest.write(folder)
    if run_id and not (run / RECORD).exists():
        (run / RECORD).write_text(json.dumps({ID: run_id}))
    return folder


def fake_run(folder: str, **progress: object) -> Path:
    """Write the folder of a run that was started: its first attempt, a log, and its progress if given."""
    path = Path(folder)
    attempt = path / "launch" / "attempt-1"
    attempt.mkdir(parents=True)
    (attempt / "command.txt").write_text("accelerate launch\n")
    (attempt / "rank-0.log").write_text("step 1/4\nstep 2/4\n")
    if progress:
        (path / PROGRESS).write_text(json.dumps(progress))
    return path


def write_rows(path: Path, *rows: object) -> Path:
    """Write JSONL, one row in each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every path under a folder, with its size and modification time."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in paths}


def run_command(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `phalanx <argv>` in this process; return its exit code. Starting ranks fails the test."""

    def started(*_: object) -> int:
        pytest.fail("the command would start ranks")

    monkeypatch.setattr(supervisor, "train", started)
    try:
        return main(argv)
    except SystemExit as error:  # argparse
        return int(error.code or 0)


def show(
    argv: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Return what `phalanx show <argv> --json` prints."""
    assert run_command(["show", *argv, "--json"], monkeypatch) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def contents(folder: Path) -> dict[str, str | bytes]:
    """Return every path under a folder: the bytes of a file, where a link leads to, "folder" for a folder."""
    found: dict[str, str | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


# What real runs left in their folders (tests/distributed/test_run_folder.py checks that none is missing).
# A name that ends with / is a folder.
NAMES_OF_RUNS = (
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.json",
    "finished.json", "generation_config.json", "metrics.jsonl", "model.safetensors", "run.json",
    "tokenizer.json", "tokenizer_config.json", "tracker.json", "trainer_state.json", "training_args.bin",
    "checkpoint-1/", "checkpoint-2/", "set-aside-1-checkpoint-3/", "saving/", "final.part/", "merged.part/",
    "runs/", "wandb/", "launch/attempt-1/", "launch/progress.json", "launch/warm-0.log", ".lock",
    ".written",
)  # fmt: skip
