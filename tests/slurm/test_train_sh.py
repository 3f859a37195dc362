"""`sbatch slurm/train.sh config.yaml` on a real cluster of two nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobsite import REPO, losses, slowly


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_two_nodes_train_as_one_does(site, backend):
    one = site.unbroken("--distributed-backend", backend)
    two = site.unbroken("--distributed-backend", backend, nodes=2)
    record = json.loads((two / "run.json").read_text())
    assert record["world_size"] == 2
    logs = two / "launch" / "attempt-1"
    assert (logs / "machine-0" / "rank-0.log").exists() and (logs / "machine-1" / "rank-1.log").exists()
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


def test_a_mistake_fails_the_job_with_its_line(site):
    state, code, output = site.submit("wrong", "--lr", "fast").end()
    assert (state, code) == ("FAILED", 2)
    assert "error: flag --lr: lr: 'fast' is not a number." in output
    assert not (site.folder / "wrong").exists()


def test_two_jobs_on_one_node_at_once(site):
    """Each has its own port, and a name may have spaces."""
    where = (f"--nodelist={next(iter(site.cluster.nodes))}", "--job-name=my two jobs")
    jobs = [site.submit(f"side-{number}", sbatch=where, **slowly(0.1)) for number in (1, 2)]
    for number, job in enumerate(jobs, start=1):
        state, code, output = job.end()
        assert (state, code) == ("COMPLETED", 0), output
        site.same_end(f"side-{number}")


def test_gpus_of_the_job_are_its_own(site):
    """Fake ones: SLURM hands them out, and NVML sees none."""
    job = site.submit("gpus", "--max-steps", "1", "--save-strategy", "no", sbatch=("--gpus-per-node=2",))
    state, _, output = job.end()
    assert state == "COMPLETED", output
    assert job.facts["TresPerNode"] == "gres:gpu:2"


def test_an_array_of_three(site):
    config = site.config("swept")
    lines = [
        f"--lr {rate} --project-name swept-{n}" for n, rate in enumerate(("1e-4", "1e-3", "1e-2"), start=1)
    ]
    (site.folder / "sweep.txt").write_text("\n".join(lines) + "\n")
    more = ("--num-processes", "2", "--max-steps", "2", "--save-strategy", "no", "--cpus-per-task", "1")
    code, out, err = site.phalanx("submit", config, "--array", "sweep.txt", "--parsable", *more)
    assert code == 0, err
    job = out.strip()
    site.cluster.wait(
        lambda: all((site.folder / f"swept-{n}" / "model.safetensors").exists() for n in (1, 2, 3)),
        "the array does not end", 240,
    )  # fmt: skip
    records = [(site.folder / f"swept-{number}" / "run.json").read_text() for number in (1, 2, 3)]
    rates = [json.loads(record)["config"]["lr"]["value"] for record in records]
    assert rates == [1e-4, 1e-3, 1e-2]
    code, out, err = site.phalanx("status", f"{job}_2")
    assert code == 0 and out.startswith("swept-2  "), out + err


def test_scripts_are_plain_bash():
    for name in ("train.sh", "array.sh"):
        text = (REPO / "slurm" / name).read_text()
        assert text.startswith("#!/usr/bin/env bash\n") and "eval" not in text and "SLURM_PROCID" not in text
    assert Path(REPO / "slurm" / "site.env.example").exists()
