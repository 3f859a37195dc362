"""A site: a folder from which jobs are submitted, and what its runs leave."""

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
    """Where jobs are submitted from. Its name has a space: no script may stumble over one."""

    cluster: Cluster
    folder: Path
    model: Path
    environ: dict[str, str]
    whole: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def config(self, name: str) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(CONFIG.format(model=self.model, name=name, data=self.folder / "data"))
        return path.name

    def submit(
        self, name: str, *flags: str, nodes: int = 1, sbatch: tuple[str, ...] = (), **more: str
    ) -> Job:
        """`sbatch slurm/train.sh name.yaml flags`: two ranks."""
        ask = ("-N", str(nodes), "--cpus-per-task=1", *sbatch)
        argv = (*ask, SCRIPT, self.config(name), "--num-processes", "2", *flags)
        return self.cluster.submit(self.folder, *argv, **self.environ | more)

    def phalanx(self, *argv: str) -> tuple[int, str, str]:
        """A command of a user on the login node: its exit code and what it prints."""
        command = (sys.executable, "-m", "launcher", *argv)
        done = self.cluster.call(self.folder, *command, **self.environ)
        return done.returncode, done.stdout, done.stderr

    def unbroken(self, *flags: str, nodes: int = 1) -> Path:
        """The folder of that run, to which nothing happened; made once."""
        key = (*flags, str(nodes))
        if key not in self.whole:
            name = f"whole-{len(self.whole)}"
            state, code, output = self.submit(name, *flags, nodes=nodes).end()
            assert (state, code) == ("COMPLETED", 0), output + self.cluster.logs()
            self.whole[key] = self.folder / name
        return self.whole[key]

    def same_end(self, name: str, *flags: str, nodes: int = 1) -> None:
        """The final weights, bit for bit, and the loss of each step."""
        run, whole = self.folder / name, self.unbroken(*flags, nodes=nodes)
        assert losses(run) == losses(whole)
        assert len(losses(run)) == STEPS
        assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    def step(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


def slowly(pause: float = 0.3, **fault: object) -> dict[str, str]:
    """A run whose steps take longer, so that something can happen to it; or with a fault of tests/faults."""
    return {"PHALANX_FAULT": json.dumps({"pause": pause, "once": "fault.once", **fault})}
