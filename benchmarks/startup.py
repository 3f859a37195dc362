"""Measure the time of --help, of show, and to the first optimiser step, and compare with a bare TRL script.

    python benchmarks/startup.py [--model .demo/SmolLM2-135M-Instruct] [--runs 5] [--json out.json]

Both start two ranks (DDP) on the same model and rows. The sides take turns, and medians are printed. Each is
timed with an empty data cache and with a full one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measure import BENCHMARKS, MODEL, OPTIMIZER, REPO, launch, need_model, provenance, table

FLAGS = ["--max-steps", "2", "--batch-size", "1", "--gradient-accumulation", "2", "--block-size", "256",
         "--model-max-length", "256", "--packing", "bfd", "--save-strategy", "no", "--valid-split", "none",
         "--logging-steps", "1", "--peft", "false", "--gradient-checkpointing", "--num-processes", "2",
         "--distributed-backend", "ddp", "--optimizer", OPTIMIZER, "--overwrite"]  # fmt: skip


def seconds_to(argv: Sequence[str], cwd: Path, marker: str | None, **environ: str) -> float:
    """Return the seconds until a line with `marker` is printed, or until the end; wait for the end."""
    began = time.perf_counter()
    process = subprocess.Popen(
        argv, cwd=cwd, env=os.environ | environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    seen, output = None, []
    for line in process.stdout:
        output.append(line)
        if marker and marker in line and seen is None:
            seen = time.perf_counter() - began
    if process.wait() != 0 or (marker and seen is None):
        raise SystemExit("".join(output))
    return seen if seen is not None else time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare start-up times with a bare TRL script.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    model, phalanx = need_model(options.model), [sys.executable, "-m", "launcher"]
    times: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        times.setdefault(name, []).append(value)
        print(f"{name}: {value:.2f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(REPO / "examples" / "data", work / "examples" / "data")
        shutil.copy(REPO / "examples" / "demo.yaml", work)
        train = [*phalanx, "train", "demo.yaml", "--project-name", "run", "--model", str(model), *FLAGS]
        bare = [*launch(2), str(BENCHMARKS / "bare_sft.py"), "--chat", "--packing", "--accumulation", "2",
                str(model), "examples/data/train.jsonl"]  # fmt: skip
        show = [*phalanx, "show", "demo.yaml", "--model", str(model), "--num-processes", "2"]
        for run in range(options.runs):
            add("phalanx --help", seconds_to([*phalanx, "--help"], work, None))
            add("phalanx train --help", seconds_to([*phalanx, "train", "--help"], work, None))
            add("phalanx show", seconds_to(show, work, None))
            cold, datasets = work / f"cold-{run}", work / f"datasets-{run}"
            first = {"marker": "step 1/2", "PHALANX_CACHE": str(cold)}
            add("first step, phalanx, empty cache", seconds_to(train, work, **first))
            environ = {"HF_DATASETS_CACHE": str(datasets)}
            add("first step, bare TRL, empty cache",
                seconds_to([*bare, str(work / "bare")], work, "'loss':", **environ))  # fmt: skip
            add(
                "first step, phalanx, full cache",
                seconds_to(train, work, "step 1/2", PHALANX_CACHE=str(cold)),
            )
            add("first step, bare TRL, full cache",
                seconds_to([*bare, str(work / "bare")], work, "'loss':", **environ))  # fmt: skip
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    where = provenance("torch", "transformers", "trl", "accelerate")
    print(f"\n{where} Medians of {options.runs} alternating runs.\n")
    print(table(["what", "time"], ([name, f"{value:.2f} s"] for name, value in medians.items())))
    if options.json:
        options.json.write_text(json.dumps({"where": where, "medians": medians, "all": times}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
