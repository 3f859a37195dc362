"""Start real ranks on the CPU, and read what a run wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from places import REPO
from terminals import Terminal

CONFIG = """\
task: llm-sft
base_model: {model}
project_name: {name}
backend: local
data:
  path: {data}
  train_split: train
  valid_split: valid
  chat_template: tokenizer
  column_mapping:
    prompt_text_column: prompt
    text_column: completion
params:
  lr: 1e-3
  max_steps: 6
  batch_size: 1
  gradient_accumulation: 2
  block_size: 128
  packing: none
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 3
  save_steps: 3
  save_total_limit: 5
"""
# backend -> flags of the launcher. One process has the same global batch as two ranks.
BACKENDS = {
    "one": ["--num-processes", "1", "--distributed-backend", "none", "--batch-size", "2"],
    "ddp": ["--num-processes", "2", "--distributed-backend", "ddp"],
    "fsdp": ["--num-processes", "2", "--distributed-backend", "fsdp"],
    "zero1": ["--num-processes", "2", "--distributed-backend", "deepspeed", "--zero-stage", "1"],
    "zero2": ["--num-processes", "2", "--distributed-backend", "deepspeed", "--zero-stage", "2"],
    "zero3": ["--num-processes", "2", "--distributed-backend", "deepspeed", "--zero-stage", "3"],
}
# trainer -> flags that select it with the config above. The rows have all columns that the trainers read.
PAIRS = ["--text-column", "chosen", "--rejected-text-column", "rejected"]
TRAINERS = {
    "default": ["--trainer", "default", "--packing", "wrapped", "--block-size", "64"],
    "sft": [],
    "reward": ["--trainer", "reward", *PAIRS],
    "dpo": ["--trainer", "dpo", *PAIRS],
    "orpo": ["--trainer", "orpo", *PAIRS],
    "kto": ["--trainer", "kto"],
    "mlm": ["--trainer", "mlm", "--model", "{masked}", "--chat-template", "none"],
}
# kto needs micro-batches of two rows on each rank. Key: whether there is one process.
KTO_BATCH = {True: ["--batch-size", "4"], False: ["--batch-size", "2"]}
MODES = {
    "full": [],
    "lora": ["--peft", "--lora-r", "4", "--lora-dropout", "0", "--quantization", "none"],
}


def environment(cache: Path) -> dict[str, str]:
    """Return an environment with this Python's folder on the PATH, offline, and with its own cache."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return dict(os.environ) | {"PATH": path, "PHALANX_CACHE": str(cache), **offline}


def listens(path: Path) -> bool:
    """Return whether a process accepts connections there. The file exists a moment earlier."""
    sockets = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in sockets)


@contextmanager
def kept_warm(
    folder: Path, environ: dict[str, str], modules: Sequence[str] = ("trainers.sft", "deepspeed")
) -> Iterator[str]:
    """Start a process that imports the libraries once for many runs; yield the value of PHALANX_WARM."""
    path = folder / "warm.socket"
    argv = [sys.executable, "-m", "trainers.warm", "--keep", str(path), *modules]
    process = subprocess.Popen(
        argv, cwd=REPO, env=environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL
    )
    try:
        while not listens(path):
            assert process.poll() is None, "the process that imports the libraries ended"
            time.sleep(0.05)
        yield str(path)
    finally:
        process.kill()
        process.wait()


@dataclass
class Finished:
    """A run that has ended: its folder, exit code and output."""

    folder: Path
    code: int
    out: str
    err: str

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.metrics if "loss" in entry]

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())


@dataclass
class Bench:
    """A working folder with a model, data, and a config file for each run."""

    root: Path
    model: Path
    masked: Path
    environ: dict[str, str]

    def config(self, name: str) -> Path:
        path = self.root / f"{name}.yaml"
        path.write_text(CONFIG.format(model=self.model, name=name, data=self.root / "data"))
        return path

    def command(self, name: str, *flags: str) -> list[str]:
        return [sys.executable, "-m", "launcher", "train", str(self.config(name)), *flags]

    def start(
        self, name: str, *flags: str, terminal: Terminal | None = None, **environ: str
    ) -> subprocess.Popen[str]:
        """Start a run that the test itself stops. Its output goes to pipes, or stdout to a terminal."""
        argv, place = self.command(name, *flags), {"cwd": self.root, "env": self.environ | environ}
        if terminal is not None:
            return terminal.start(argv, stderr=subprocess.PIPE, **place)
        return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **place)

    def finish(self, name: str, argv: list[str], **environ: str) -> Finished:
        done = subprocess.run(
            argv, cwd=self.root, env=self.environ | environ, text=True, capture_output=True, timeout=180
        )
        return Finished(self.root / name, done.returncode, done.stdout, done.stderr)

    def flags(self, backend: str, mode: str, trainer: str) -> list[str]:
        """Return the flags of one cell of the matrix."""
        flags = [*BACKENDS[backend], *MODES[mode], *TRAINERS[trainer]]
        flags += KTO_BATCH[backend == "one"] if trainer == "kto" else []
        return [flag.format(masked=self.masked) for flag in flags]

    def train(self, name: str, *flags: str, **environ: str) -> Finished:
        return self.finish(name, self.command(name, *flags), **environ)
