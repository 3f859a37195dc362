"""What the benchmarks share: running processes in turn, medians, and the origin of the figures.

The parent process does not import torch, so that the measured memory of its children is their own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.plan.topology import detect_hardware

REPO = Path(__file__).resolve().parent.parent
BENCHMARKS = REPO / "benchmarks"
MODEL = REPO / ".demo" / "SmolLM2-135M-Instruct"
GIB = 2**30
OPTIMIZER = "adamw_torch_fused"  # TRL's default, so that all sides of a comparison use the same
LAST_LINES = 300  # lines kept of a failed process: accelerate's traceback comes after that of the ranks
_ERROR = re.compile(r"(\[rank\d+\]: ?)?(error: |[\w.]*Error: )")
_OF_THE_LAUNCHER = re.compile("ChildFailedError|CalledProcessError")


class Failed(Exception):
    """A measured process ended with an error. The message is the last lines that it printed."""

    @property
    def reason(self) -> str:
        """The most useful line: the last one that names an error of a rank, else the last line."""
        lines = str(self).splitlines() or ["no output"]
        named = [line for line in lines if _ERROR.match(line) and not _OF_THE_LAUNCHER.search(line)]
        return (named or lines)[-1].strip()[:160]


def provenance(*packages: str) -> str:
    """Return the command, the machine and the versions, which every table of figures needs."""
    known = {"Python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(REPO) if script.is_relative_to(REPO) else script
    return f"`{shlex.join(['python', str(shown), *sys.argv[1:]])}`, {machine()}, {versions}."


def machine() -> str:
    """Return the processor, cores, memory and GPUs of this machine."""
    found = detect_hardware()
    gpus = ", ".join(f"{gpu.name} ({gpu.memory / GIB:.0f} GiB)" for gpu in found.gpus) or "no GPU"
    return f"{_processor()}, {found.cores} cores, {found.memory / GIB:.0f} GiB, {gpus}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0]}" if names else platform.machine()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Return the median, and the smallest and largest value if there are several."""
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), form)} to {format(max(values), form)})"


def need(path: Path, what: str, how: str) -> Path:
    """Return a required file or folder as an absolute path; end the program if it is missing."""
    if not path.exists():
        raise SystemExit(f"error: {what} is missing: {path} does not exist. {how}")
    return path.resolve()


def need_model(folder: Path) -> Path:
    make = f"Make it: python examples/get_model.py {folder}"
    need(folder / "config.json", "the model", make)
    return folder.resolve()


def need_rows(file: Path) -> list[dict[str, Any]]:
    need(file, "the data", "Give --data, a JSONL file (see --help for its columns).")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def question(row: Mapping[str, Any]) -> str:
    """Return instruction and input as Alpaca's plain prompt: all trainers make the same tokens from it."""
    given = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
    return f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"


def log_normal_lengths(rows: int, mean: float, longest: int, seed: int, sigma: float = 0.9) -> Any:
    """Return lengths like those of instruction data, many short and a few long: (rows,) int64.

    `mean` is the mean of the distribution before lengths above `longest` are cut to `longest`.
    """
    import numpy as np

    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, rows)
    return np.clip(drawn.astype(np.int64), 4, longest)


def alternate(
    kinds: Mapping[str, Callable[[int], Any]], repeats: int, show: Callable[[Any], str] = str
) -> tuple[dict[str, list[Any]], dict[str, Failed]]:
    """Measure each kind in turn, `repeats` times: a, b, c, a, b, c, ... So a slow minute of the machine
    affects all of them. A kind that fails is not tried again.

    Returns the results, and the reasons of the kinds that failed. Progress goes to stderr.
    """
    results: dict[str, list[Any]] = {name: [] for name in kinds}
    failed: dict[str, Failed] = {}
    for repeat in range(repeats):
        for name, measured in kinds.items():
            if name in failed:
                continue
            try:
                results[name].append(measured(repeat))
                line = show(results[name][-1])
            except Failed as reason:
                failed[name], line = reason, f"failed:\n{reason}"
            print(f"{repeat + 1}/{repeats} {name}: {line}", file=sys.stderr, flush=True)
    return {name: values for name, values in results.items() if name not in failed}, failed


def run(argv: Sequence[str], cwd: Path, **environ: str) -> str:
    """Run a child process to its end with this checkout on its path, and return what it printed.

    Raises:
        Failed: the process ended with an error.
    """
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        argv, cwd=cwd, env=os.environ | {"PYTHONPATH": path} | environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode != 0:
        raise Failed("\n".join(done.stdout.strip().splitlines()[-LAST_LINES:]))
    return done.stdout


def launch(ranks: int) -> list[str]:
    """Return `accelerate launch` with the same ranks, threads and types for every side of a comparison."""
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(ranks)]
    argv += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    argv += ["--num_cpu_threads_per_process", str(max(1, detect_hardware().cores // ranks))]
    # MULTI_GPU also works for CPU ranks: gloo replaces NCCL.
    return [*argv, "--multi_gpu", "--main_process_port", "0"] if ranks > 1 else argv


@dataclass
class Observed:
    """What benchmarks/observe.py recorded in a rank. The lists have an entry for each step."""

    ends: list[float]  # seconds, at the end of the step
    tokens: list[int]  # seen by all ranks since the start
    losses: list[float]
    memory: int  # peak of the resident set, in bytes
    gpu_memory: int | None  # peak that torch allocated, in bytes

    def tokens_per_second(self, dropped: int = 1) -> float:
        """Return the speed over the steps after the first `dropped`, without start-up and warm-up."""
        return (self.tokens[-1] - self.tokens[dropped - 1]) / (self.ends[-1] - self.ends[dropped - 1])

    def seconds_per_step(self, dropped: int = 1) -> float:
        return (self.ends[-1] - self.ends[dropped - 1]) / (len(self.ends) - dropped)


def observe(target: Sequence[str], work: Path, ranks: int, **environ: str) -> list[Observed]:
    """Run a training module or script under `accelerate launch`; return what each rank recorded.

    Raises:
        Failed: the run ended with an error.
    """
    with tempfile.TemporaryDirectory(dir=work) as notes:
        run([*launch(ranks), str(BENCHMARKS / "observe.py"), notes, *target], work, **environ)
        return [Observed(**json.loads((Path(notes) / f"{r}.json").read_text())) for r in range(ranks)]


def peak_memory() -> int:
    """Return the peak of this process's resident set in bytes, including pages of mapped files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PeakOwnMemory(threading.Thread):
    """A thread that samples the memory of this process, without the pages of mapped files, which the system
    can take back. `grown` is the peak in the block minus the value at its start, in bytes. It misses memory
    that lives shorter than the interval."""

    def __init__(self, interval: float = 0.02) -> None:
        super().__init__(daemon=True)
        self.interval, self.stopped = interval, threading.Event()
        self.before = self.peak = self.now()

    @property
    def grown(self) -> int:
        return self.peak - self.before

    def run(self) -> None:
        while not self.stopped.wait(self.interval):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def __enter__(self) -> PeakOwnMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, self.now())
        self.stopped.set()
        self.join()
