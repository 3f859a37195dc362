"""Build a trainer in this process, from a config as a rank does, without launcher or process group."""

from __future__ import annotations

import csv
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config.settings import Settings, resolve
from trainers.config.values import Value

ROWS = [
    {
        "prompt": f"What is {i} plus {i}?",
        "completion": f"The answer to the question is {2 * i}. " * (1 + i % 3),
        "label": i % 3 != 0,
        "chosen": f"The answer to the question is {2 * i}. " * (1 + i % 3),
        "rejected": f"Ranks are {i}. " * (1 + i % 4),
        "text": f"The sum of {i} and {i} is {2 * i}. " * (1 + i % 4),
    }
    for i in range(6)
]
PEFT = {"peft": True, "quantization": None, "lora_r": 4, "max_steps": 3, "lr": 1e-2}


def write_split(path: Path, rows: Any) -> None:
    """Write rows in the format of the suffix. Text and bytes are written as they are."""
    if isinstance(rows, (str, bytes)):
        path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Built:
    """A trainer before its first step, its context and its settings."""

    trainer: Any
    context: Any
    settings: Settings


def settings_of(**values: Any) -> Settings:
    return resolve({name: Value(value, f"test {name}", name) for name, value in values.items()})


def build(work: Path, model: Path, rows: list[dict[str, Any]] | None = None, **values: Any) -> Built:
    """Build `values["trainer"]` with rows (default: ROWS), which are written to `work`."""
    from trainers.loop import life
    from trainers.rank.library_output import quieten_libraries

    os.environ["PHALANX_CACHE"] = str(work / "cache")
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_split(data / "train.jsonl", rows or ROWS)
    defaults = {
        "model": str(model),
        "project_name": str(work / "run"),
        "data_path": str(data),
        "block_size": 96,
        "batch_size": 6,
        "gradient_accumulation": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "warmup_ratio": 0.0,
    }
    if "mix" in values:
        defaults.pop("data_path")
    settings = settings_of(**{**defaults, **values})
    quieten_libraries()
    context = life._prepare(settings, Path(settings.train.project_name))
    module = importlib.import_module(f"trainers.{settings.train.kind.module}")
    trainer = module.build(context)
    life.complete(trainer, context)
    return Built(trainer, context, settings)


def train(built: Built, checkpoint: Path | None = None) -> Built:
    """Train as a run does, with the callback of all runs."""
    from trainers.loop.step_boundary import StepBoundary

    built.trainer.add_callback(StepBoundary(built.trainer, checkpoint))
    built.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return built


def logged(built: Built) -> list[dict[str, Any]]:
    """Train, and return what was logged at each step."""
    built.trainer.train()
    return [entry for entry in built.trainer.state.log_history if "loss" in entry]


def outputs(model: Any, ids: list[int]) -> Any:
    """Return the logits of a sequence: (1, tokens, vocabulary)."""
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits
