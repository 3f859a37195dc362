"""Measure the launcher's time for many nodes in a dry run: the list of nodes, a request, a machine's files.

    python benchmarks/scale.py [--nodes 1,16,128,1024] [--runs 5] [--json out.json]

Nothing is submitted or started. Nodes have 8 GPUs each. The list of nodes is SLURM's short form with gaps, so
that it contains each number. The figures of a machine are those of the last one. Medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from measure import REPO, provenance, table

from launcher.config import load_run
from launcher.plan.backend import resolve_backend
from launcher.plan.nodelist import expand_nodelist
from launcher.plan.topology import Gpu, Hardware, resolve_topology
from launcher.supervise import attempt

GPUS = 8
NODE = Hardware((Gpu("NVIDIA H100 80GB HBM3", 80 << 30, (9, 0)),) * GPUS, 1 << 40, 96, cpu_bf16=True)
CONFIG = """\
task: llm-sft
base_model: org/model
project_name: run
data: {path: org/data}
params: {distributed_backend: fsdp, peft: true, quantization: none}
"""


def environment(nodes: int) -> dict[str, str]:
    """Return the environment of a task on the last node: node[0001,0003,0005...]."""
    numbers = ",".join(f"{2 * number + 1:04d}" for number in range(nodes))
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_NNODES": str(nodes),
        "SLURM_NODEID": str(nodes - 1),
        "SLURM_STEP_NODELIST": f"node[{numbers}]",
    }


def files_of_a_machine(folder: Path, environ: dict[str, str]) -> int:
    """Load the config, resolve topology and backend, write an attempt's files; return the number of ranks."""
    run = load_run(folder / "config.yaml", {})
    topology = resolve_topology(run.launch, NODE, environ)
    attempt.prepare(run, topology, resolve_backend(run, topology), 1)
    return topology.num_processes


def submit(folder: Path, nodes: int) -> None:
    argv = ["submit", "config.yaml", "--nodes", str(nodes), "--gpus-per-node", str(GPUS)]
    argv += ["--project-name", "another", "--dry-run"]
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "launcher", *argv]
    subprocess.run(command, cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the launcher's work for many nodes in a dry run.")
    parser.add_argument("--nodes", default="1,16,128,1024")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    sizes = [int(word) for word in options.nodes.split(",")]
    times: dict[int, list[tuple[float, float, float]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
        for _ in range(options.runs):
            for size in sizes:
                environ = environment(size)
                nodelist = environ["SLURM_STEP_NODELIST"]
                assert len(expand_nodelist(nodelist)) == size
                assert files_of_a_machine(folder, environ) == GPUS * size
                found = (
                    seconds(lambda nodelist=nodelist: expand_nodelist(nodelist)),
                    seconds(lambda environ=environ: files_of_a_machine(folder, environ)),
                    seconds(lambda size=size: submit(folder, size)),
                )
                times[size].append(found)
        os.chdir(REPO)
    medians = {
        size: [statistics.median(column) for column in zip(*rows, strict=True)]
        for size, rows in times.items()
    }
    print(provenance("pydantic", "torch"), "\n")
    head = [
        "nodes x GPUs",
        "list of nodes",
        "files and command of a machine",
        "submit --dry-run, with process start",
    ]
    rows = [
        [f"{size:,} x {GPUS}", f"{a * 1e3:.1f} ms", f"{b * 1e3:.0f} ms", f"{c:.2f} s"]
        for size, (a, b, c) in medians.items()
    ]
    print(table(head, rows))
    if options.json:
        options.json.write_text(json.dumps(times, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
