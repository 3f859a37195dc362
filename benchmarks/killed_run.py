"""A run that recovery.py kills: phalanx or torchrun in its own folder, observed through its files."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from measure import OPTIMIZER, REPO, Failed
from run_processes import belongs, end_all

from launcher.plan.topology import detect_hardware
from trainers.rank.heartbeat import heartbeat_file, read_heartbeat
from trainers.rank.proc_stat import read_stat

ROWS = REPO / "examples" / "data" / "train.jsonl"
RANKS, LENGTH, LR, KEPT = 2, 128, 2e-5, 2
ENDLESS = 100_000  # steps and restarts: more than any run reaches
PATIENCE = 120.0  # seconds without a step after which a launch counts as not recovered
TICK = 0.01  # seconds between two reads of the logs
TRIES = 5  # starts by hand in a row before a side counts as failed
# The log of rank 0 in each attempt, and the files with the ranks' process ids: phalanx, torchrun.
LOGS = ("run/launch/attempt-*/rank-0.log", "logs/*/attempt_*/0/stdout.log")
PIDS = ("run/launch/attempt-*/rank-{}.pid", "run/rank-{}.pid")
_STEP = re.compile(r"step (\d+)/\d+ +loss ")
_NAMED = re.compile(r"rank (\d+) failed first.*; restart \d+ of|failed \(exitcode: -?\d+\) local_rank: (\d+)")


@dataclass(frozen=True)
class Step:
    at: float  # time.monotonic() at its end
    attempt: int  # from 0, over all starts of the side
    number: int


@dataclass(frozen=True)
class Kill:
    """What followed a kill: seconds from the kill, None if it did not happen.

    After a kill in the final save or the merge, `first_step` is when that was done: no step follows.
    """

    rank: int
    at_save: bool  # the last step before the kill was a step with a save
    noticed: float | None
    first_step: float | None
    named: bool  # the launcher named the rank that was killed
    # phalanx only: the phase that the rank reported (trainers/rank/heartbeat.py). "end": before the final
    # model is saved; "saved": after it.
    phase: str = ""


def step_number(line: str) -> int | None:
    """Return the optimiser step that a line of rank 0 reports, or None."""
    found = _STEP.match(line)
    return int(found[1]) if found else None


def named_rank(line: str) -> int | None:
    """Return the rank that failed first according to a launcher's line, or None."""
    found = _NAMED.search(line)
    return int(found[1] or found[2]) if found else None


class Side:
    """A launch in its own folder, observed through the files that it writes."""

    def __init__(
        self, kind: str, folder: Path, model: Path, save_steps: int,
        sections: Mapping[str, Mapping[str, Any]] | None = None, environ: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Start nothing yet. `sections` has more values of phalanx's config, `environ` more variables."""
        self.kind, self.folder, self.model, self.save_steps = kind, folder, model, save_steps
        self.sections, self.environ = sections or {}, environ or {}
        self.mark = folder / "tmp"  # the TMPDIR of all its processes
        self.mark.mkdir()
        self.logs: list[TextIO] = []  # logs of rank 0, one for each attempt
        self.steps: list[Step] = []
        self.named: list[tuple[float, int]] = []  # when the launcher named a rank, and which rank
        self.starts = self.before = 0  # starts, and attempts before the last start
        self.since = 0.0  # time of its start or its last step

    @property
    def attempt(self) -> int:
        return len(self.logs) - 1

    @property
    def taken(self) -> int:
        """The number of steps of the newest attempt."""
        return sum(step.attempt == self.attempt >= self.before for step in self.steps)

    def start(self) -> None:
        self.starts, self.before, self.since = self.starts + 1, len(self.logs), time.monotonic()
        environ = os.environ | environment(self.folder.parent)
        environ |= {"TMPDIR": str(self.mark), **self.environ}
        path = self.folder / f"stderr-{self.starts}.log"
        argv = command(self.kind, self.folder, self.model, self.save_steps, self.sections)
        with path.open("wb") as errors:
            self.process = subprocess.Popen(argv, cwd=self.folder, env=environ, start_new_session=True,
                                            stdout=subprocess.DEVNULL, stderr=errors)  # fmt: skip
        self.errors = path.open(errors="replace")

    def stop(self) -> None:
        end_all(self.mark)
        self.process.wait()

    def look(self) -> None:
        """Read what is new in the logs."""
        now = time.monotonic()
        ranks = map(named_rank, self.errors.readlines())
        self.named += [(now, rank) for rank in ranks if rank is not None]
        known = {log.name for log in self.logs}
        paths = (path for pattern in LOGS for path in self.folder.glob(pattern))
        self.logs += [path.open(errors="replace") for path in paths if str(path) not in known]
        for attempt in range(len(self.logs))[-2:]:
            numbers = map(step_number, self.logs[attempt].readlines())
            new = [Step(now, attempt, number) for number in numbers if number is not None]
            self.steps += new
            self.since = now if new else self.since

    def until(self, wanted: Callable[[], bool]) -> bool:
        """Read the logs until `wanted`; return False if the launch ended or made no step for too long."""
        while True:
            ended = self.process.poll() is not None
            self.look()
            if ended or time.monotonic() - self.since > PATIENCE:
                return False
            if wanted():
                return True
            time.sleep(TICK)

    def insist(self, wanted: Callable[[], bool]) -> None:
        """Read the logs until `wanted`, and start the launch again as often as necessary.

        Raises:
            Failed: it needs too many starts.
        """
        for _ in range(TRIES):
            if self.until(wanted):
                return
            self.stop()
            output = Path(self.errors.name).read_text(errors="replace").strip()
            print(f"started again by hand; {output[-200:]}", file=sys.stderr, flush=True)
            self.repair()
            self.start()
        raise Failed(output)

    def repair(self) -> None:
        """Remove the newest checkpoint of torchrun if several attempts died before a step: it is incomplete.

        Phalanx skips such a checkpoint itself.
        """
        saved = sorted(self.folder.glob("run/checkpoint-*"), key=lambda path: int(path.name[11:]))
        if self.kind == "torchrun" and saved and self.attempt - self.steps[-1].attempt > 1:
            shutil.rmtree(saved[-1])

    def wait(self, moment: float = 0.0, steps: int = 0) -> None:
        """Wait until a moment, and until the newest attempt has taken this many steps."""
        self.insist(lambda: time.monotonic() >= moment and self.taken >= steps)

    def pid(self, rank: int) -> int | None:
        """Return the process id of a rank of the newest attempt; None if it is gone."""
        files = [path for pattern in PIDS for path in self.folder.glob(pattern.format(rank))]
        newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
        pid = int((newest and newest.read_text()) or 0)
        return pid if pid and belongs(pid, self.mark) else None

    def heartbeats(self, rank: int) -> Path:
        """Return the file of a rank's heartbeats; it exists if phalanx runs."""
        folders = sorted(self.mark.glob("phalanx-heartbeats-*"), key=lambda path: path.stat().st_mtime_ns)
        return heartbeat_file(folders[-1] if folders else self.mark, rank)

    def phase(self, rank: int) -> str:
        """Return the phase that a rank reports, or an empty string."""
        beat = read_heartbeat(self.heartbeats(rank))
        return beat.phase if beat is not None else ""

    @property
    def ending(self) -> list[str] | None:
        """What phalanx has done since it saved the final model, such as "merge"; None: it is not saved."""
        with suppress(OSError, ValueError):
            done: list[str] = json.loads((self.folder / "run" / "finished.json").read_text())["done"]
            return done
        return None

    def strike(self, rank: int) -> tuple[float, str] | None:
        """Kill a rank with SIGKILL and wait until it has ended. Return when, and in which phase.

        Returns None if it had ended before.
        """
        pid = self.pid(rank)
        if pid is None:
            return None
        with suppress(ProcessLookupError):
            watched, beats = os.pidfd_open(pid), self.heartbeats(rank)
            opened = os.open(beats, os.O_RDONLY) if beats.exists() else None  # the launcher soon removes it
            at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            select.select([watched], [], [], PATIENCE)
            beat = None if opened is None else read_heartbeat(Path(f"/proc/self/fd/{opened}"))
            for number in filter(None, (watched, opened)):
                os.close(number)
            phase = beat.phase if beat is not None else ""
            return at, "saved" if phase == "end" and self.ending is not None else phase
        return None

    def kill(self, rank: int) -> Kill | None:
        """Kill a rank in training, and return what followed; None if the rank was gone already."""
        attempt, at_save = self.attempt, self.steps[-1].number % self.save_steps == 0
        return self.followed(rank, at_save, lambda: self.steps[-1].attempt > attempt)

    def followed(self, rank: int, at_save: bool, back: Callable[[], bool]) -> Kill | None:
        """Kill a rank, wait until `back`, and return what followed; None if the rank was gone already."""
        known, struck = len(self.named), self.strike(rank)
        if struck is None:
            return None
        at, phase = struck
        recovered = self.until(back) or back()  # the launch may have ended since
        noticed, named = self.named[known] if len(self.named) > known else (None, None)
        after = time.monotonic() - at if recovered else None
        return Kill(rank, at_save, None if noticed is None else noticed - at, after, named == rank, phase)

    def kill_process(self, pid: int) -> float | None:
        """Kill a process that is no rank, such as the warm one, and return the seconds until the next step.

        Returns None if no step follows.
        """
        attempt, at = self.attempt, time.monotonic()
        os.kill(pid, signal.SIGKILL)
        return self.steps[-1].at - at if self.until(lambda: self.steps[-1].attempt > attempt) else None

    def kill_launcher(self) -> float | None:
        """Kill the launcher, start it again with --resume, and return the seconds until the next step."""
        attempt, at = self.attempt, time.monotonic()
        self.process.kill()
        self.process.wait()
        self.start()
        return self.steps[-1].at - at if self.until(lambda: self.steps[-1].attempt > attempt) else None

    def warm_process(self) -> int:
        """Return the id of the process that forks the ranks."""
        pid = self.pid(0)
        if pid is None:
            raise Failed("rank 0 has ended")
        return read_stat(pid).parent


@contextmanager
def running(kind: str, work: Path, model: Path, save_steps: int, **more: Any) -> Iterator[Side]:
    """Start a side in a folder of its own while the block runs. `more`: as for Side."""
    with tempfile.TemporaryDirectory(dir=work, prefix=f"{kind}-") as folder:
        side = Side(kind, Path(folder), model, save_steps, **more)
        side.start()
        try:
            yield side
        finally:
            side.stop()


def command(
    kind: str, folder: Path, model: Path, save_steps: int,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:  # fmt: skip
    """Return the command of the same job for phalanx or torchrun. Both resume from an earlier start."""
    if kind != "torchrun":
        more = sections or {}
        launch = {"num_processes": RANKS, "start": kind, "max_restarts": ENDLESS, **more.get("launch", {})}
        params = {"max_steps": ENDLESS, "save_steps": save_steps, **more.get("params", {})}
        config = write_config(folder, model, launch, **params)
        resume = ["--resume"] if (folder / "run").exists() else []
        return [sys.executable, "-m", "launcher", "train", str(config), *resume]
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    head += ["--max-restarts", str(ENDLESS), "--log-dir", "logs", "--redirects", "3"]
    script = [str(REPO / "benchmarks" / "bare_resuming.py"), str(model), str(ROWS), "run"]
    script += ["--length", str(LENGTH), "--lr", str(LR), "--kept", str(KEPT), "--steps", str(ENDLESS)]
    return [*head, *script, "--save-steps", str(save_steps)]


def environment(work: Path) -> dict[str, str]:
    """Return the environment of every side: CPU ranks that share the cores, own caches, this checkout."""
    threads, path = max(1, detect_hardware().cores // RANKS), os.environ.get("PYTHONPATH", "")
    caches = {name: str(work / name) for name in ("HF_DATASETS_CACHE", "PHALANX_CACHE")}
    return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), path])),
            **caches}  # fmt: skip


def write_config(folder: Path, model: Path, launch: dict[str, Any], **more: Any) -> Path:
    """Write the job as a config of phalanx. JSON is valid YAML."""
    params = {"batch_size": 1, "gradient_accumulation": 1, "lr": LR, "block_size": LENGTH, "packing": "none",
              "model_max_length": LENGTH, "optimizer": OPTIMIZER, "logging_steps": 1, "peft": False,
              "quantization": None, "save_total_limit": KEPT, **more}  # fmt: skip
    columns = {"prompt_text_column": "prompt", "text_column": "completion"}
    data = {"path": str(ROWS), "train_split": "train", "chat_template": None, "column_mapping": columns}
    config = {"task": "llm-sft", "base_model": str(model), "project_name": "run", "data": data}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config | {"params": params, "launch": launch}), encoding="utf-8")
    return path
