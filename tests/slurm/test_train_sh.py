"""`sbatch slurm/train.sh config.yaml` on a real cluster of two nodes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from cluster import Cluster
from jobsite import SCRIPT, Site, losses, slowly
from pages import fences, text_after
from places import REPO

from launcher.cli import build_parser


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_two_nodes_have_the_losses_of_one(site, backend):
    one = site.uninterrupted("--distributed-backend", backend)
    two = site.uninterrupted("--distributed-backend", backend, nodes=2)
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
    """Each job has its own port, and the job name has spaces."""
    where = (f"--nodelist={next(iter(site.cluster.nodes))}", "--job-name=my two jobs")
    jobs = [site.submit(f"side-{number}", sbatch=where, **slowly(0.1)) for number in (1, 2)]
    for number, job in enumerate(jobs, start=1):
        state, code, output = job.end()
        assert (state, code) == ("COMPLETED", 0), output
        site.same_end(f"side-{number}")


@pytest.mark.parametrize(
    ("flags", "gpus", "cores"),
    [
        (("--gpus-per-node=2", "--cpus-per-task=2"), "0,1", "2"),
        (("--gres=gpu:2", "--cpus-per-task=3"), "0,1", "3"),
        (("--gpus-per-node=1",), "0", ""),
        (("--cpus-per-task=2",), "", "2"),
    ],
)
def test_gpus_and_cores_of_a_task(site, flags, gpus, cores):
    """A script replaces phalanx and prints them. The GPUs are files that SLURM assigns; NVML sees none."""
    folder = site.folder / "instead"
    folder.mkdir(exist_ok=True)
    (folder / "phalanx").write_text(
        '#!/bin/bash\necho "$@: GPUs ${CUDA_VISIBLE_DEVICES-}; cores ${SLURM_CPUS_PER_TASK-}"\n'
    )
    (folder / "phalanx").chmod(0o755)
    (folder / "site.env").write_text(f'PATH="{folder}:$PATH"\n')
    environ = {"PHALANX_SITE_ENV": str(folder / "site.env")}
    state, _, output = site.cluster.run(site.folder, *flags, SCRIPT, "a b.yaml", **environ)
    assert (state, output) == ("COMPLETED", f"train a b.yaml: GPUs {gpus}; cores {cores}\n")


def test_an_array_of_three_runs(site):
    config = site.config("swept")
    lines = [
        f"--lr {rate} --project-name swept-{n}" for n, rate in enumerate(("1e-4", "1e-3", "1e-2"), start=1)
    ]
    (site.folder / "three.txt").write_text("\n".join(lines) + "\n")
    more = ("--num-processes", "2", "--max-steps", "2", "--save-strategy", "no", "--cpus-per-task", "1")
    code, out, err = site.phalanx("submit", config, "--array", "three.txt%2", "--parsable", *more)
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


def test_nodes_without_a_shared_cache_each_prepare_the_data(site):
    """The cache has one path, on another disk of each node. Of two interfaces the right one is used."""
    local = site.folder / "local.env"
    local.write_text(
        Path(site.environ["PHALANX_SITE_ENV"]).read_text() + f"export PHALANX_CACHE={site.cluster.disk}\n"
    )
    job = site.submit("local", "--max-steps", "1", nodes=2, PHALANX_SITE_ENV=str(local))
    state, _, output = job.end()
    assert state == "COMPLETED", output
    assert f"cache: {site.cluster.disk}/data is not shared by the machines: each prepares the data" in output
    assert output.count("network: GLOO_SOCKET_IFNAME=eth0") == 2


def test_commands_of_the_slurm_page_are_accepted(site):
    """sbatch, submit's checks or the command's parser accept each command of docs/slurm.md."""
    commands = [
        shlex.split(line, comments=True)
        for fence in fences("bash")
        for line in fence.commands
        if fence.page == "slurm"
    ]
    assert len(commands) >= 10
    (site.folder / "slurm").symlink_to(REPO / "slurm")
    (site.folder / "config.yaml").write_text((site.folder / site.config("my-run")).read_text())
    for name in ("sweep.txt", "sweep-of-configs.txt"):
        (site.folder / name).write_text(text_after("slurm.md", f"`{name}`"))
    for other in ("a.yaml", "b.yaml"):
        (site.folder / other).write_text((site.folder / site.config(other[0])).read_text())
    for command in commands:
        if command[0] == "sbatch":
            done = site.cluster.call(site.folder, "sbatch", "--test-only", *command[1:], **site.environ)
            assert done.returncode == 0, f"{command}: {done.stderr}"
        elif command[1] == "submit":
            code, out, err = site.phalanx(*command[1:], "--dry-run")
            assert code == 0 and out.startswith("sbatch "), f"{command}: {err}"
        else:
            build_parser(command[1]).parse_args(command[1:])


@pytest.mark.slow
def test_a_cluster_with_only_ipv6(site):
    """The nodes and the controller have only IPv6 addresses."""
    other = Cluster(ipv6=True)
    try:
        other.up()
        for backend in ("ddp", "fsdp"):
            job = Site(other, site.folder, site.model, site.environ).submit(
                f"six-{backend}", "--distributed-backend", backend, nodes=2
            )
            state, _, output = job.end()
            assert state == "COMPLETED", output + other.logs()
            assert losses(site.folder / f"six-{backend}") == pytest.approx(
                losses(site.uninterrupted("--distributed-backend", backend, nodes=2)), abs=1e-4
            )
    finally:
        other.down()


def test_scripts_have_the_same_lines_for_the_site():
    """sbatch runs a copy of a script from its spool folder, so each has the same lines for the site."""
    preambles = set()
    for name in ("train.sh", "array.sh", "evaluate.sh"):
        text = (REPO / "slurm" / name).read_text()
        assert text.startswith("#!/usr/bin/env bash\n") and "eval " not in text and "SLURM_PROCID" not in text
        preambles.add(text[text.index("set -euo") : text.index("    export SRUN_CPUS_PER_TASK")])
    assert len(preambles) == 1
    assert Path(REPO / "slurm" / "site.env.example").exists()
