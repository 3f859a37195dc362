"""`phalanx submit`: checks a run on the login node (no torch, no GPU), and hands slurm/train.sh to sbatch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from launcher.backend import STATIC, resolve_backend
from launcher.check import preflight
from launcher.config import Run, SlurmConfig, load_run
from launcher.slurm import NoSlurm, ask
from launcher.topology import Gpu, Hardware, Topology
from trainers.config import ConfigError
from trainers.run_folder import LAUNCH

TRAIN, ARRAY = STATIC / "slurm" / "train.sh", STATIC / "slurm" / "array.sh"
JOBS = f"{LAUNCH}/jobs.jsonl"  # the jobs of a run, oldest first
# Of what kind the GPUs are is known on the nodes alone: the checks that depend on it are made there.
_SOME_GPU = Gpu("requested", 1 << 40, (9, 0))


def sbatch_argv(run: Run, script: Sequence[str] | None = None, array: str | None = None) -> list[str]:
    """The command that submits this run: `sbatch --nodes=2 ... slurm/train.sh config.yaml`."""
    flags = [f"--array={array}"] if array else []
    for name, value in run.slurm.model_dump(exclude_none=True).items():
        if value is not False:
            dashed = f"--{name.replace('_', '-')}"
            flags.append(dashed if value is True else f"{dashed}={value}")
    if run.slurm.dependency and "after" in run.slurm.dependency:
        flags.append("--kill-on-invalid-dep=yes")  # else a job whose turn cannot come waits for ever
    return ["sbatch", *flags, *(script or (str(TRAIN), str(run.config_path or "config.yaml")))]


def requested(run: Run) -> Topology:
    """The topology that the request will give.

    Raises:
        ConfigError: it contradicts itself.
    """
    ask_for, launch = run.slurm, run.launch
    machines, gpus = ask_for.nodes or 1, _gpus(ask_for)
    if launch.num_machines not in (None, machines):
        raise ConfigError(
            f"launch.num_machines: {launch.num_machines} is not the {machines} of slurm.nodes. Leave it out: "
            "the job knows its nodes."
        )
    processes = launch.num_processes or machines * max(gpus, 1)
    if processes % machines or (gpus and processes // machines > gpus):
        raise ConfigError(
            f"launch.num_processes: {processes} ranks do not fit on {machines} nodes"
            + (f" of {gpus} GPUs" if gpus else "")
            + f". Allowed: a multiple of {machines}"
            + (f" up to {machines * gpus}." if gpus else ".")
        )
    hardware = Hardware((_SOME_GPU,) * gpus, 1 << 50, ask_for.cpus_per_task or 1, cpu_bf16=True)
    return Topology(machines, 0, processes, "node", 0, hardware)


def _gpus(slurm: SlurmConfig) -> int:
    """GPUs on each node: of --gpus-per-node, or of --gres, as gpu, gpu:4 or gpu:a100:4."""
    if slurm.gpus_per_node is not None:
        return slurm.gpus_per_node
    for part in (slurm.gres or "").split(","):
        if found := re.fullmatch(r"gpu(:[A-Za-z]\w*)?(?:[:=](\d+))?", part):
            return int(found[2] or 1)
    return 0


def check(run: Run) -> None:
    """All that can be known before the job starts.

    Raises:
        ConfigError: the first thing that would stop it.
    """
    resolve_backend(run, requested(run))
    preflight(run)


@dataclass(frozen=True)
class Task:
    """A run of a submission; several where it is an array."""

    run: Run
    index: int | None = None


def plan(config: Path, flags: Mapping[str, Any], sweep: Path | None) -> tuple[list[Task], list[str]]:
    """Loads and checks what is to be submitted; returns the runs, and sbatch's argv.

    `sweep` is a file with the further flags of a run in each line, in words without quotes.

    Raises:
        ConfigError: what is wrong, in the line of the sweep where there is one.
    """
    run = load_run(config, flags)
    words = _words(flags)
    for word in (str(config), str(sweep), *words):
        if not word.isprintable():
            raise ConfigError(f"{word!r} has control characters. A job's command may hold none.")
    if sweep is None:
        check(run)
        return [Task(run)], sbatch_argv(_named(run), [str(TRAIN), str(config), *words])
    tasks = []
    for number, line in enumerate(_lines(sweep), start=1):
        try:
            own = load_run(config, {**flags, **_flags(line)})
            check(own)
        except ConfigError as error:
            raise ConfigError(f"{sweep}:{number}: {error}") from None
        tasks.append(Task(own, number))
    names = [task.run.train.project_name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{sweep}: two lines have one project_name, {twice}. Give each line its own.")
    script = [str(ARRAY), str(sweep), str(config), *words]
    return tasks, sbatch_argv(_named(run), script, f"1-{len(tasks)}")


def submit(tasks: Sequence[Task], argv: Sequence[str]) -> str:
    """Calls sbatch, notes the job in the folder of each run, and returns its id.

    Raises:
        ConfigError: sbatch refused.
    """
    try:
        job = ask(*argv[:1], "--parsable", *argv[1:]).partition(";")[0]
    except NoSlurm as error:
        raise ConfigError(f"{error}") from None
    for task in tasks:
        note(task.run.folder, job if task.index is None else f"{job}_{task.index}")
    return job


def note(folder: Path, job: str, step: int | None = None) -> None:
    """Notes that a job was submitted, or, with the step that the run has reached, that it started."""
    path = folder / JOBS
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"job": job, "time": round(time.time()), "step": step}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def jobs(folder: Path) -> list[str]:
    """The jobs of a run, oldest first."""
    return list(dict.fromkeys(entry["job"] for entry in _noted(folder)))


def last_job(folder: Path) -> str | None:
    """The job that was submitted or started last; None where there was none."""
    return next(iter(jobs(folder)[-1:]), None)


def starts_in_vain(folder: Path, job: str) -> int:
    """How many starts of a job in a row, before the last one, came no further."""
    steps = [entry["step"] for entry in _noted(folder) if entry["job"] == job and entry["step"] is not None]
    return sum(1 for _ in takewhile(lambda step: step == steps[-1], reversed(steps[:-1])))


def _noted(folder: Path) -> list[dict[str, Any]]:
    path = folder / JOBS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _named(run: Run) -> Run:
    if run.slurm.job_name:
        return run
    slurm = run.slurm.model_copy(update={"job_name": Path(run.train.project_name).name})
    return replace(run, slurm=slurm)


def _words(flags: Mapping[str, Any]) -> list[str]:
    """The flags of the run as they were given; those of SLURM are sbatch's."""
    found = []
    for name, value in flags.items():
        if name not in SlurmConfig.model_fields:
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def _lines(sweep: Path) -> list[str]:
    try:
        lines = sweep.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"--array: {sweep}: {error.strerror}. Give a file with a line of flags a run."
        ) from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError(f"--array: {sweep} has no lines. Give a line of flags for each run.")
    return lines


def _flags(line: str) -> dict[str, str]:
    """`--lr 1e-4 --project-name a` as flags; each has one word for its value."""
    words = line.split()
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise ConfigError(f"{line!r} is not a list of `--flag value`.")
    odd = next((word for word in words if not re.fullmatch(r"[A-Za-z0-9._:,/@%+=\[\]-]+", word)), None)
    if odd:
        raise ConfigError(f"{odd!r} may not stand here. Allowed: letters, digits and ._:,/@%+=[]-")
    return {name[2:].replace("-", "_"): value for name, value in zip(names, values, strict=True)}
