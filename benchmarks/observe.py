"""Run a training module or script unchanged, and record the end, tokens and loss of each step.

    accelerate launch benchmarks/observe.py NOTES trainers.sft config.yaml
    accelerate launch benchmarks/observe.py NOTES benchmarks/bare_sft.py MODEL DATA OUT

The same callback measures both sides of a comparison: every Trainer of transformers loads it. NOTES is a
folder; each rank writes `<rank>.json` there (measure.Observed). Tokens are those that the trainer logs as
seen. throughput.py checks that all sides count the same tokens for the same rows.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import TrainerCallback


class Observer(TrainerCallback):
    def __init__(self, notes: Path) -> None:
        self.path = notes / f"{os.environ.get('RANK', '0')}.json"
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the GPU still computes
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.tokens.append(int(logs["num_tokens"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_gpu = torch.cuda.is_available()
        noted = {
            "ends": self.ends,
            "tokens": self.tokens,
            "losses": self.losses,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "gpu_memory": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
        self.path.write_text(json.dumps(noted), encoding="utf-8")


def main() -> None:
    notes, target, *rest = sys.argv[1:]
    # The Trainer reads this list in its constructor, and takes classes and objects.
    transformers.trainer.DEFAULT_CALLBACKS.append(Observer(Path(notes)))
    sys.argv = [target, *rest]
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
