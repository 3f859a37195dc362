"""The folder of a finished run, and the facts that its card shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from trainers.storage import run_files
from trainers.storage.ending import Ending
from trainers.storage.manifest import entry_of

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


def write_run(folder: Path, model: Path) -> Path:
    """Write the folder of a finished run, with the model and all other files that a run writes."""
    shutil.copytree(model, folder)
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
    run_files.begin(folder, of_earlier_version=True)
    finish_run(folder)
    return folder


def finish_run(folder: Path) -> Ending:
    """Write finished.json for the model that is in the folder, as a run does after it has saved it."""
    ending = Ending(step=4, metrics={"train_loss": 5.9}, model_step=4)
    names = [name for name in run_files.final_names(folder) if (folder / name).is_file()]
    ending.files = [entry_of(folder, folder / name) for name in names]
    ending.write(folder)
    return ending


def make_adapter(folder: Path) -> Path:
    """Turn the model of a run into an adapter, whose base model is in a folder of this machine."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        run_files.own(folder, name)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    base = {"base_model_name_or_path": str(folder.parent / "base"), "peft_type": "LORA", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    finish_run(folder)
    return folder
