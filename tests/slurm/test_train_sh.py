"""`sbatch slurm/train.sh config.yaml` on a real cluster of two nodes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from cluster import Cluster, missing

REPO = Path(__file__).parent.parent.parent
SCRIPT = str(REPO / "slurm" / "train.sh")
REASON = missing()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

CONFIG = """\
task: llm-sft
base_model: {model}
project_name: {name}
data:
  path: {data}
  train_split: train
  chat_template: tokenizer
params:
  max_steps: 3
  batch_size: 1
  gradient_accumulation: {accumulation}
  lr: 1e-3
  block_size: 64
  packing: none
  logging_steps: 1
  save_strategy: "no"
  distributed_backend: {backend}
"""


@pytest.fixture(scope="module")
def cluster():
    made = Cluster()
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def site(tmp_path_factory, tiny_model):
    """A shared folder with data and a site file; returns it and the environment of a submission."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "data").mkdir()
    rows = [{"prompt": f"What is {i}?", "completion": f"The answer is {i}."} for i in range(16)]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = folder / "site.env"
    env.write_text(
        f"export PATH={Path(sys.executable).parent}:{os.environ['PATH']}\n"
        f"export PHALANX_CACHE={folder}/cache HF_HUB_OFFLINE=1 GLOO_SOCKET_IFNAME=eth0\n"
    )
    return folder, {"PHALANX_SITE_ENV": str(env)}


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


def write(folder: Path, tiny_model: Path, name: str, backend: str, accumulation: int) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(
        CONFIG.format(
            model=tiny_model, name=name, data=folder / "data", backend=backend, accumulation=accumulation
        )
    )
    return path.name


def test_two_nodes_train_as_one_process_does(cluster, site, tiny_model):
    folder, environ = site
    config = write(folder, tiny_model, "two", "ddp", 1)
    flags = ["--nodes=2", "--cpus-per-task=1"]
    state, code, output = cluster.run(folder, *flags, SCRIPT, config, "--num-processes", "2", **environ)
    assert (state, code) == ("COMPLETED", 0), output + cluster.logs()
    record = json.loads((folder / "two" / "run.json").read_text())
    assert record["world_size"] == 2
    logs = folder / "two" / "launch" / "attempt-1"
    assert (logs / "machine-0" / "rank-0.log").exists() and (logs / "machine-1" / "rank-1.log").exists()

    config = write(folder, tiny_model, "one", "none", 2)
    state, code, output = cluster.run(folder, SCRIPT, config, **environ)
    assert (state, code) == ("COMPLETED", 0), output + cluster.logs()
    assert (folder / "one" / "model.safetensors").exists()
    assert "step 3/3" in output
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), abs=1e-4)


def test_a_mistake_fails_the_job_with_its_line(cluster, site, tiny_model):
    folder, environ = site
    config = write(folder, tiny_model, "wrong", "ddp", 1)
    state, code, output = cluster.run(folder, SCRIPT, config, "--lr", "fast", **environ)
    assert (state, code) == ("FAILED", 2)
    assert "error: flag --lr: lr: 'fast' is not a number." in output
    assert not (folder / "wrong").exists()
