"""A site: a folder from which jobs are submitted, and the files of its runs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cluster import Cluster, Job
from places import REPO

SCRIPT = str(REPO / "slurm" / "train.sh")
EVALUATE = str(REPO / "slurm" / "evaluate.sh")
STEPS = 12
CONFIG = """\
task: llm-sft
base_model: {model}
project_name: {name}
data:
  path: {data}
  train_split: train
  chat_template: tokenizer
params:
  max_steps: 12
  batch_size: 1
  gradient_accumulation: 2
  lr: 1e-3
  block_size: 64
  packing: none
  logging_steps: 1
  save_strategy: steps
  save_steps: 4
  save_total_limit: 2
  distributed_backend: ddp
"""


@dataclass
class Site:
    """The folder from which jobs are submitted. Its name has a space: scripts must handle it."""

    cluster: Cluster
    folder: Path
    model: Path
    environ: dict[str, str]
    # Runs without a fault, by their flags.
    finished: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def config(self, name: str) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(CONFIG.format(model=self.model, name=name, data=self.folder / "data"))
        return path.name

    def submit(
        self, name: str, *flags: str, nodes: int = 1, sbatch: tuple[str, ...] = (), **more: str
    ) -> Job:
        """Submit `slurm/train.sh name.yaml flags` with two ranks."""
        ask = ("-N", str(nodes), "--cpus-per-task=1", *sbatch)
        argv = (*ask, SCRIPT, self.config(name), "--num-processes", "2", *flags)
        return self.cluster.submit(self.folder, *argv, **self.environ | more)

    def phalanx(self, *argv: str) -> tuple[int, str, str]:
        """Run a phalanx command on the login node; return its exit code, stdout and stderr."""
        command = (sys.executable, "-m", "launcher", *argv)
        done = self.cluster.call(self.folder, *command, **self.environ)
        return done.returncode, done.stdout, done.stderr

    def uninterrupted(self, *flags: str, nodes: int = 1) -> Path:
        """Return the folder of the run without a fault, which is made once."""
        key = (*flags, str(nodes))
        if key not in self.finished:
            name = f"uninterrupted-{len(self.finished)}"
            state, code, output = self.submit(name, *flags, nodes=nodes).end()
            assert (state, code) == ("COMPLETED", 0), output + self.cluster.logs()
            self.finished[key] = self.folder / name
        return self.finished[key]

    def same_end(self, name: str, *flags: str, nodes: int = 1) -> None:
        """Check that the final weights are equal, bit for bit, and the loss of each step."""
        run, expected = self.folder / name, self.uninterrupted(*flags, nodes=nodes)
        assert losses(run) == losses(expected)
        assert len(losses(run)) == STEPS
        assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()

    def step(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


def slowly(pause: float = 0.3, **fault: object) -> dict[str, str]:
    """Return variables that make each step longer, so that a test can act; or that plant a fault."""
    return {"PHALANX_FAULT": json.dumps({"pause": pause, "once": "fault.once", **fault})}
