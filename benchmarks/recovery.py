"""Ranks that are killed: how soon it is noticed, how soon training goes on, and what saving for it costs.

    python examples/get_model.py .demo/SmolLM2-135M-Instruct
    python benchmarks/recovery.py [--kills 20] [--minutes 5] [--only warm,goodput] [--json out.json]

Two ranks on the CPU train a cut model in float32. The parts, in this order:

    warm, accelerate   phalanx train --start ..., ddp: kill -9 of a random rank at a random moment
    torchrun           the same for torchrun --standalone --max-restarts with bare_resuming.py
    goodput            one kill a minute for --minutes: phalanx (warm) and torchrun
    stall              steps with a save beside steps without: ddp, fsdp (asynchronous) and zero2

Noticed: the line that names the failed rank; both launchers print it when the other ranks are gone.
First step: the first that ends in a later attempt than the killed one, whatever its number. Both are seconds
from the kill. At a save: the last step before the kill was one to be saved. Not recovered: the launch ended,
or took no step for two minutes. It is then started again by hand, torchrun's without its newest checkpoint
where several attempts died before a step. Goodput: steps that were kept x the median step without a save /
wall time, from the end of the first step. A save waits: by how much its step is longer than the others.
The sides take turns, each turn a fresh run; the moments and ranks of a turn are the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from measure import MODEL, OPTIMIZER, REPO, Failed, alternate, need_model, provenance, run, spread, table

from launcher.topology import detect_hardware, free_port

ROWS = REPO / "examples" / "data" / "train.jsonl"
SIDES = {"warm": "phalanx, warm", "accelerate": "phalanx, accelerate launch", "torchrun": "torchrun, TRL"}
GOALS = {"warm": (2.0, 8.0), "accelerate": (2.0, 25.0)}  # seconds until it is noticed, and until a step ends
BACKENDS = {"ddp": "ddp", "fsdp": "fsdp", "zero2": "deepspeed_zero2"}  # -> file in accelerate_configs
PARTS = (*SIDES, "goodput", "stall")
RANKS, LENGTH, LR, KEPT = 2, 128, 2e-5, 2
ENDLESS = 100_000  # steps, and restarts: more than there will be
OFTEN, SELDOM = 2, 10  # steps from save to save: of a run that is killed in every few steps, and of goodput
PATIENCE = 120.0  # seconds that a launch may take no step
TICK = 0.01  # seconds between two looks at the logs
TRIES = 5  # starts by hand in a row after which a side is given up
KILL_TURNS, GOODPUT_TURNS, STALL_TURNS = 4, 2, 3
STALL_EVERY, STALL_STEPS = 4, 21
# What rank 0 writes in each attempt, and where the ranks leave their process ids: phalanx, torchrun.
LOGS = ("run/launch/attempt-*/rank-0.log", "logs/*/attempt_*/0/stdout.log")
PIDS = ("run/launch/attempt-*/rank-{}.pid", "run/rank-{}.pid")
_STEP = re.compile(r"step (\d+)/\d+ +loss ")
_NAMED = re.compile(r"rank (\d+) failed first.*; restart \d+ of|failed \(exitcode: -?\d+\) local_rank: (\d+)")


@dataclass(frozen=True)
class Step:
    at: float  # time.monotonic() at its end
    attempt: int  # counted over all starts of the side, from 0
    number: int


@dataclass(frozen=True)
class Kill:
    """Seconds from the kill; None where it did not come."""

    rank: int
    at_save: bool  # the last step was to be saved, and no step had ended since
    noticed: float | None
    first_step: float | None
    named: bool  # the launcher named the rank that was killed


@dataclass(frozen=True)
class Goodput:
    share: float
    kept: int
    taken: int  # steps, with those that were lost
    step_seconds: float
    kills: int = 0
    by_hand: int = 0  # starts after the first


@dataclass(frozen=True)
class Stall:
    """Seconds."""

    step: float  # in a run without saves
    wait: float  # by how much a step with a save is longer than the others of its run
    added: float  # by a save to a run, with the later steps that it slows down


# ---------------------------------------------------------------------------------- what the figures are


def step_number(line: str) -> int | None:
    """The optimiser step that a line of rank 0 reports, if it does."""
    found = _STEP.match(line)
    return int(found[1]) if found else None


def named_rank(line: str) -> int | None:
    """The rank of which a line of a launcher says that it failed first, if it does."""
    found = _NAMED.search(line)
    return int(found[1] or found[2]) if found else None


def goodput(steps: Sequence[Step], save_steps: int) -> Goodput:
    """Between the ends of the first and the last of the steps: what the last one builds on was kept."""
    kept, wall = steps[-1].number - steps[0].number, steps[-1].at - steps[0].at
    in_turn = [(a, b) for a, b in pairwise(steps) if a.attempt == b.attempt and a.number % save_steps]
    seconds = statistics.median(after.at - before.at for before, after in in_turn)
    return Goodput(kept * seconds / wall, kept, len(steps) - 1, seconds)


def stall(saving: Sequence[float], plain: Sequence[float], every: int) -> Stall:
    """From when the steps of two runs ended; the first run saved once in `every` steps, the second never."""
    waits: dict[bool, list[float]] = {True: [], False: []}
    for number, (before, after) in enumerate(pairwise(saving[1:]), start=2):  # the first step is no measure
        waits[number % every == 0].append(after - before)
    begin, cycles = every - 1, len(saving) // every - 1  # whole cycles, each with one save
    end = begin + cycles * every
    longer = saving[end] - saving[begin] - (plain[end] - plain[begin])
    step = statistics.median(after - before for before, after in pairwise(plain[1:]))
    return Stall(step, statistics.median(waits[True]) - statistics.median(waits[False]), longer / cycles)


def share_of(turn: int, turns: int, whole: int) -> int:
    """What a turn has of the whole, as even as can be."""
    return whole * (turn + 1) // turns - whole * turn // turns


# ---------------------------------------------------------------------------------- a run that is killed


def belongs(pid: int | str, mark: Path) -> bool:
    """Whether a process was started with `mark` for its TMPDIR, itself or by an ancestor."""
    with suppress(OSError):
        return f"TMPDIR={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def end_all(mark: Path) -> None:
    """Kills all processes that belong to `mark`, and waits until they are gone."""
    while left := [int(path.name) for path in Path("/proc").glob("[0-9]*") if belongs(path.name, mark)]:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(TICK)


class Side:
    """A launch in a folder of its own, watched through the files that it writes."""

    def __init__(self, kind: str, folder: Path, model: Path, save_steps: int) -> None:
        self.kind, self.folder, self.model, self.save_steps = kind, folder, model, save_steps
        self.mark = folder / "tmp"  # TMPDIR of all its processes
        self.mark.mkdir()
        self.logs: list[TextIO] = []  # of rank 0, one for each attempt
        self.steps: list[Step] = []
        self.named: list[tuple[float, int]] = []  # when the launcher named a rank, and which
        self.starts = self.before = 0  # starts, and attempts before the last of them
        self.since = 0.0  # when it was started or took its last step

    @property
    def attempt(self) -> int:
        return len(self.logs) - 1

    @property
    def taken(self) -> int:
        """Steps of the newest attempt."""
        return sum(step.attempt == self.attempt >= self.before for step in self.steps)

    def start(self) -> None:
        self.starts, self.before, self.since = self.starts + 1, len(self.logs), time.monotonic()
        environ = os.environ | environment(self.folder.parent)
        environ |= {"TMPDIR": str(self.mark), "PYTHONUNBUFFERED": "1"}
        path = self.folder / f"stderr-{self.starts}.log"
        argv = command(self.kind, self.folder, self.model, self.save_steps)
        with path.open("wb") as errors:
            self.process = subprocess.Popen(argv, cwd=self.folder, env=environ, start_new_session=True,
                                            stdout=subprocess.DEVNULL, stderr=errors)  # fmt: skip
        self.errors = path.open(errors="replace")

    def stop(self) -> None:
        end_all(self.mark)
        self.process.wait()

    def look(self) -> None:
        """Reads what is new."""
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
        """Watches until `wanted`; False where the launch ended before, or took no step for too long."""
        while True:
            ended = self.process.poll() is not None
            self.look()
            if ended or time.monotonic() - self.since > PATIENCE:
                return False
            if wanted():
                return True
            time.sleep(TICK)

    def insist(self, wanted: Callable[[], bool]) -> None:
        """Watches until `wanted`, with as many starts by hand as that takes.

        Raises:
            Failed: it takes too many.
        """
        for _ in range(TRIES):
            if self.until(wanted):
                return
            self.stop()
            said = Path(self.errors.name).read_text(errors="replace").strip()
            print(f"started again by hand; {said[-200:]}", file=sys.stderr, flush=True)
            self.repair()
            self.start()
        raise Failed(said)

    def repair(self) -> None:
        """Where several attempts died before a step the newest checkpoint was cut short; phalanx skips it."""
        saved = sorted(self.folder.glob("run/checkpoint-*"), key=lambda path: int(path.name[11:]))
        if self.kind == "torchrun" and saved and self.attempt - self.steps[-1].attempt > 1:
            shutil.rmtree(saved[-1])

    def wait(self, moment: float = 0.0, steps: int = 0) -> None:
        """Until a moment, and until the newest attempt has taken so many steps."""
        self.insist(lambda: time.monotonic() >= moment and self.taken >= steps)

    def kill(self, rank: int) -> Kill | None:
        """kill -9, and what became of it; None where the rank was gone already."""
        attempt, told = self.attempt, len(self.named)
        files = (path for pattern in PIDS for path in self.folder.glob(pattern.format(rank)))
        pid = int(max(files, key=lambda path: path.stat().st_mtime_ns).read_text())
        if not belongs(pid, self.mark):
            return None
        at, at_save = time.monotonic(), self.steps[-1].number % self.save_steps == 0
        os.kill(pid, signal.SIGKILL)
        recovered = self.until(lambda: self.steps[-1].attempt > attempt)
        noticed, named = self.named[told] if len(self.named) > told else (None, None)
        first = self.steps[-1].at - at if recovered else None
        return Kill(rank, at_save, None if noticed is None else noticed - at, first, named == rank)


def command(kind: str, folder: Path, model: Path, save_steps: int) -> list[str]:
    """The same job for phalanx and for torchrun; each goes on from what an earlier start has saved."""
    if kind != "torchrun":
        launch = {"num_processes": RANKS, "start": kind, "max_restarts": ENDLESS}
        config = write_config(folder, model, launch, max_steps=ENDLESS, save_steps=save_steps)
        resume = ["--resume"] if (folder / "run").exists() else []
        return [sys.executable, "-m", "launcher", "train", str(config), *resume]
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    head += ["--max-restarts", str(ENDLESS), "--log-dir", "logs", "--redirects", "3"]
    script = [str(REPO / "benchmarks" / "bare_resuming.py"), str(model), str(ROWS), "run"]
    script += ["--length", str(LENGTH), "--lr", str(LR), "--kept", str(KEPT), "--steps", str(ENDLESS)]
    return [*head, *script, "--save-steps", str(save_steps)]


def environment(work: Path) -> dict[str, str]:
    """For every side: ranks on the CPU with a share of the cores each, caches of their own, this checkout."""
    threads, path = max(1, detect_hardware().cores // RANKS), os.environ.get("PYTHONPATH", "")
    caches = {name: str(work / name) for name in ("HF_DATASETS_CACHE", "PHALANX_CACHE")}
    return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), path])), **caches}  # fmt: skip


def write_config(folder: Path, model: Path, launch: dict[str, Any], **more: Any) -> Path:
    """The job as a config of phalanx; JSON is YAML."""
    params = {"batch_size": 1, "gradient_accumulation": 1, "lr": LR, "block_size": LENGTH, "packing": "none",
              "model_max_length": LENGTH, "optimizer": OPTIMIZER, "logging_steps": 1, "peft": False,
              "quantization": None, "save_total_limit": KEPT, **more}  # fmt: skip
    columns = {"prompt_text_column": "prompt", "text_column": "completion"}
    data = {"path": str(ROWS), "train_split": "train", "chat_template": None, "column_mapping": columns}
    whole = {"task": "llm-sft", "base_model": str(model), "project_name": "run", "data": data}
    path = folder / "config.yaml"
    path.write_text(json.dumps(whole | {"params": params, "launch": launch}), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------- the parts


class Parts:
    """Measures with the cut model."""

    def __init__(self, options: Namespace, model: Path, work: Path) -> None:
        self.options, self.model, self.work = options, model, work

    @contextmanager
    def running(self, kind: str, save_steps: int) -> Iterator[Side]:
        with tempfile.TemporaryDirectory(dir=self.work, prefix=f"{kind}-") as folder:
            side = Side(kind, Path(folder), self.model, save_steps)
            side.start()
            try:
                yield side
            finally:
                side.stop()

    def killed(self, kind: str, turn: int) -> list[Kill]:
        draw, found = random.Random(f"{self.options.seed} kills {turn}"), []
        with self.running(kind, OFTEN) as side:
            while len(found) < share_of(turn, min(KILL_TURNS, self.options.kills), self.options.kills):
                steps, pause, rank = 1 + draw.randint(1, 10), draw.random(), draw.randrange(RANKS)
                side.wait(steps=steps)
                side.wait(time.monotonic() + pause)
                found += filter(None, [side.kill(rank)])
        return found

    def goodput(self, kind: str, turn: int) -> Goodput:
        draw, kills = random.Random(f"{self.options.seed} goodput {turn}"), 0
        with self.running(kind, SELDOM) as side:
            side.wait(steps=1)
            first, starts, began = len(side.steps) - 1, side.starts, side.steps[-1].at
            for minute in range(self.options.minutes):
                moment, rank = began + 60 * minute + draw.uniform(20, 40), draw.randrange(RANKS)
                side.wait(moment)
                if side.taken:  # a run that has not recovered is left alone
                    kills += side.kill(rank) is not None
            end = began + 60 * self.options.minutes
            side.insist(lambda: side.taken > 0 and side.steps[-1].at >= end)
            by_hand = side.starts - starts
        return replace(goodput(side.steps[first:], SELDOM), kills=kills, by_hand=by_hand)

    def stall(self, backend: str, _: int) -> Stall:
        saving = self.ends(backend, save_steps=STALL_EVERY)
        return stall(saving, self.ends(backend, save_strategy="no"), STALL_EVERY)

    def ends(self, backend: str, **saving: Any) -> list[float]:
        """When the steps of a run ended, as rank 0 saw it in its own process."""
        config = REPO / "accelerate_configs" / f"{BACKENDS[backend]}.yaml"
        argv = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        argv += ["--num_processes", str(RANKS), "--main_process_port", str(free_port())]
        with tempfile.TemporaryDirectory(dir=self.work) as notes:
            job = write_config(Path(notes), self.model, {}, max_steps=STALL_STEPS, **saving)
            argv += [str(REPO / "benchmarks" / "observe.py"), notes, "trainers.sft", str(job)]
            try:
                run(argv, Path(notes), TMPDIR=notes, **environment(self.work))
            finally:
                end_all(Path(notes))
            return json.loads(Path(notes, "0.json").read_text())["ends"]


def kills_row(kind: str, turns: Sequence[Sequence[Kill]]) -> list[str]:
    """Whether a goal is met is said of the worst kill."""
    kills = [kill for turn in turns for kill in turn]
    back = [kill.first_step for kill in kills if kill.first_step is not None]
    noticed = [kill.noticed for kill in kills if kill.noticed is not None]
    saves = [kill for kill in kills if kill.at_save]
    back_from_saves = sum(kill.first_step is not None for kill in saves)
    cells = [f"{len(back)} of {len(kills)}", f"{back_from_saves} of {len(saves)}"]
    cells += [f"{sum(kill.named for kill in kills)} of {len(kills)}"]
    cells += [f"{spread(values, '.2f')} s" if values else "never" for values in (noticed, back)]
    if kind not in GOALS:
        return [SIDES[kind], *cells, ""]
    soon, first = GOALS[kind]
    met = len(back) == len(noticed) == len(kills) and max(noticed) < soon and max(back) <= first
    return [SIDES[kind], *cells, f"all, {soon:g} s, {first:g} s: {'met' if met else 'MISSED'}"]


def goodput_row(kind: str, turns: Sequence[Goodput]) -> list[str]:
    shares = spread([100 * turn.share for turn in turns], ".1f")
    step = spread([turn.step_seconds for turn in turns], ".2f")
    kept, taken = sum(turn.kept for turn in turns), sum(turn.taken for turn in turns)
    kills, by_hand = sum(turn.kills for turn in turns), sum(turn.by_hand for turn in turns)
    return [SIDES[kind], f"{shares} %", f"{kept:,} of {taken:,}", f"{step} s", str(kills), str(by_hand)]


def stall_row(backend: str, turns: Sequence[Stall]) -> list[str]:
    figures = [[t.step for t in turns], [t.wait for t in turns], [t.added for t in turns]]
    step, wait, added = (f"{spread(values, '.2f')} s" for values in figures)
    return [backend, step, wait, spread([t.wait / t.step for t in turns], ".2f"), added]


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--layers", type=int, default=2, help="layers that the model is cut to")
    parser.add_argument("--kills", type=int, default=20, help=f"of a side, in {KILL_TURNS} turns")
    parser.add_argument("--minutes", type=int, default=5, help=f"of a turn; goodput has {GOODPUT_TURNS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(PARTS), help="some of the parts, with commas between")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if unknown := set(options.only.split(",")) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if min(options.kills, options.minutes, options.layers) < 1:
        parser.error("--kills, --minutes and --layers are 1 at least")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    source, chosen = need_model(options.model), options.only.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what was started
    found: dict[str, Any] = {"where": provenance("torch", "transformers", "trl", "accelerate")}
    print(found["where"])
    print(
        f"{options.layers} layers, all trained, float32; a step is a row of at most {LENGTH} tokens a rank."
    )
    print(f"Ranks are killed in runs that save every {OFTEN} steps, those of goodput every {SELDOM}.")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        cut = [sys.executable, str(REPO / "benchmarks" / "cut_model.py"), str(source), "model"]
        run([*cut, "--layers", str(options.layers)], work)
        parts = Parts(options, work / "model", work)
        killed = {kind: partial(parts.killed, kind) for kind in SIDES if kind in chosen}
        good = {kind: partial(parts.goodput, kind) for kind in ("warm", "torchrun") if "goodput" in chosen}
        stalls = {backend: partial(parts.stall, backend) for backend in BACKENDS if "stall" in chosen}
        for name, kinds, turns, row, head in (
            ("kills", killed, min(KILL_TURNS, options.kills), kills_row,
             ["killed", "recovered", "at a save", "named", "noticed after", "first step after", "goals"]),
            ("goodput", good, GOODPUT_TURNS, goodput_row,
             ["one kill a minute", "goodput", "steps kept", "median step", "kills", "starts by hand"]),
            ("stall", stalls, STALL_TURNS, stall_row,
             [f"a save in {STALL_EVERY} steps", "step", "a save waits", "in steps", "it adds in all"]),
        ):  # fmt: skip
            found[name], reasons = alternate(kinds, turns)
            if kinds:
                print(f"\n{table(head, [row(kind, values) for kind, values in found[name].items()])}")
            for kind, reason in reasons.items():
                print(f"{kind}: not measured: {reason.reason}")
            failed |= bool(reasons)
            if options.json:
                options.json.write_text(json.dumps(found, indent=2, default=asdict))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
