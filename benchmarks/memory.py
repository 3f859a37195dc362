"""Measure peak memory and step time for each mode of activation checkpointing, and for some optimisers.

    python benchmarks/memory.py [--model .demo/SmolLM2-135M-Instruct] [--layers 6] [--steps 8] [--runs 2]

One process. The model is cut to its first layers, and each step takes full blocks of tokens. Each run is a
new process, and the kinds take turns. Memory is the peak of the rank's resident set; on a GPU it is the peak
that torch allocated. The time is the median over the steps of all runs, without the first step of each run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import BENCHMARKS, MODEL, alternate, need_model, observe, provenance, run, spread, table

# name of the kind -> its differences from the config below.
KINDS: dict[str, dict[str, Any]] = {
    "none": {"activation_checkpointing": "none"},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "full, adamw_torch_fused": {"optimizer": "adamw_torch_fused"},
    "full, adamw_bnb_8bit": {"optimizer": "adamw_bnb_8bit"},
}
MIB = 2**20
Measured = tuple[int, list[float]]  # peak memory in bytes, and the seconds of each step except the first


def config(work: Path, options: argparse.Namespace, more: dict[str, Any]) -> Path:
    """Write a config of the default trainer, whose blocks are all full. JSON is valid YAML."""
    params = {
        "max_steps": options.steps,
        "batch_size": options.batch_size,
        "gradient_accumulation": 1,
        "block_size": options.block_size,
        "model_max_length": options.block_size,
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "overwrite": True,
        **more,
    }
    values = {
        "task": "llm-default",
        "base_model": str(work / "model"),
        "project_name": "run",
        "data": {"path": "data"},
        "params": params,
    }
    path = work / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def measured(work: Path, options: argparse.Namespace, more: dict[str, Any], _: int) -> Measured:
    rank = observe(["trainers.clm", str(config(work, options, more))], work, 1)[0]
    return rank.gpu_memory or rank.memory, [end - begin for begin, end in pairwise(rank.ends)]


def row(name: str, runs: Sequence[Measured], plain: Sequence[Measured]) -> list[str]:
    peaks, seconds = [peak / MIB for peak, _ in runs], [s for _, steps in runs for s in steps]
    relative = statistics.median(seconds) / statistics.median(s for _, steps in plain for s in steps)
    return [name, spread(peaks), spread(seconds, ".2f"), f"{relative:.2f}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure memory and time of checkpointing and optimisers.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="steps of a run; the first is not timed")
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args(argv)
    model = need_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "data").mkdir()
        sentence = "Ranks that work on the same model average their gradients before each step. "
        tokens = options.steps * options.batch_size * options.block_size
        row_of_text = json.dumps({"text": sentence * 20}) + "\n"  # 15 tokens a sentence
        (work / "data" / "train.jsonl").write_text(row_of_text * (tokens // 200), encoding="utf-8")
        cut = [sys.executable, str(BENCHMARKS / "cut_model.py"), str(model), str(work / "model")]
        run([*cut, "--layers", str(options.layers)], work)
        kinds = {name: partial(measured, work, options, more) for name, more in KINDS.items()}
        results, failed = alternate(kinds, options.runs, lambda found: f"{found[0] / MIB:.0f} MiB")
    if "none" not in results:
        raise SystemExit(f"error: {failed['none']}")
    print(provenance("torch", "transformers", "trl", "bitsandbytes"))
    print(f"{options.layers} layers, {options.batch_size} x {options.block_size} tokens a step, float32.\n")
    rows = [row(name, runs, results["none"]) for name, runs in results.items()]
    print(table(["activation_checkpointing", "peak memory, MiB", "seconds a step", "relative to none"], rows))
    for name, reason in failed.items():
        print(f"\n{name}: not measured: {reason.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
