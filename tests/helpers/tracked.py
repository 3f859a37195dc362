"""Read what a run logs: metrics.jsonl, wandb's file (a LevelDB log of records), TensorBoard's files."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any


def forget_wandb() -> None:
    """End wandb's service, which then writes the rest of its files. The next start rereads the settings."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_records(path: Path) -> list[Any]:
    """Return the records of a wandb file: 7 bytes, then LevelDB's log, blocks of 32 KiB with record parts.

    Each part: checksum (4 bytes), length (2), kind (1: complete, 2: first, 3: middle, 4: last), data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    forget_wandb()
    block, head = 32768, 7
    data, position = path.read_bytes(), head
    records, parts = [], b""
    while position + head <= len(data):
        left = block - position % block
        if left < head:
            position += left  # too short for another header: zeros
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + head : position + head + length]
        position += head + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def items(entries: Any) -> dict[str, Any]:
    return {"/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries}


def wandb_run(path: Path) -> Any:
    [run] = [record.run for record in wandb_records(path) if record.HasField("run")]
    return run


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows, without wandb's own counters."""
    rows = [items(record.history.item) for record in wandb_records(path) if record.HasField("history")]
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in rows]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(folder)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def report_logs(folder: Path, tracker: Any, *logs: dict[str, Any], resumed_step: int = 0) -> list[Any]:
    """Return the lines of metrics.jsonl after these logs, read as strict JSON."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from trainers.output.metrics import Report

    report = Report(folder, False, resumed_step, tracker)
    arguments: Any = TrainingArguments.__new__(TrainingArguments)
    for step, values in enumerate(logs, start=resumed_step + 1):
        state = TrainerState(global_step=step, max_steps=9, epoch=step / 8, is_world_process_zero=True)
        report.on_log(arguments, state, TrainerControl(), dict(values))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]
