"""Kill ranks, and measure when it is noticed, when training resumes, and what saves cost.

    python examples/get_model.py .demo/SmolLM2-135M-Instruct
    python benchmarks/recovery.py [--kills 20] [--minutes 5] [--only warm,goodput] [--json out.json]

Two ranks on the CPU train a cut model in float32. The parts, in this order:

    warm, accelerate   phalanx train --start ..., ddp: kill -9 of a random rank at a random moment
    torchrun           the same for torchrun --standalone --max-restarts with bare_resuming.py
    goodput            one kill a minute for --minutes: phalanx (warm) and torchrun
    stall              steps with a save compared with steps without: ddp, fsdp (asynchronous) and zero2
    ddp, fsdp, zero2   kills in training, the final save and the merge (recovery_to_end.py)
    parent             kill -9 of the warm process (recovery_parents.py)
    launcher, kept     kill -9 of the launcher, which is started again; kept: with a kept warm process

Noticed: when the launcher prints the name of the failed rank; both launchers do it when the other ranks are
gone. First step: when the first step of a later attempt ends, whatever its number. Both are seconds from the
kill. At a save: the last step before the kill was a step with a save. Not recovered: the launch ended, or
took no step for two minutes. This script then starts it again. If several attempts of torchrun died before a
step, it first removes the newest checkpoint. Goodput: steps kept x the median step without a save / wall
time, from the end of the first step. A save waits: how much longer a step with a save is than the others.
The sides take turns, each turn is a new run, and the moments and ranks of a turn are the same for all sides.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import recovery_parents
import recovery_to_end
from killed_run import LENGTH, RANKS, Kill, Side, Step, environment, running, write_config
from measure import MODEL, REPO, alternate, need_model, provenance, run, spread, table
from run_processes import end_all

from launcher.plan.topology import free_port

SIDES = {"warm": "phalanx, warm", "accelerate": "phalanx, accelerate launch", "torchrun": "torchrun, TRL"}
GOALS = {"warm": (2.0, 8.0), "accelerate": (2.0, 25.0)}  # seconds until noticed, and until a step ends
FILES = {"ddp": "ddp", "fsdp": "fsdp", "zero2": "deepspeed_zero2"}  # name -> file in accelerate_configs
PARTS = (*SIDES, "goodput", "stall", *recovery_to_end.BACKENDS, *recovery_parents.KINDS)
OFTEN, SELDOM = 2, 10  # steps between saves: in a run that is killed every few steps, and for goodput
KILL_TURNS, GOODPUT_TURNS, STALL_TURNS = 4, 2, 3
STALL_EVERY, STALL_STEPS = 4, 21


@dataclass(frozen=True)
class Goodput:
    share: float
    kept: int
    taken: int  # all steps, including lost ones
    step_seconds: float
    kills: int = 0
    by_hand: int = 0  # starts after the first one


@dataclass(frozen=True)
class Stall:
    """The cost of saves, in seconds."""

    step: float  # median step of a run without saves
    wait: float  # how much longer a step with a save is than the others of its run
    added: float  # time that a save adds to a run, including later steps that it slows down


def goodput(steps: Sequence[Step], save_steps: int) -> Goodput:
    """Return the goodput from the end of the first step to the end of the last one.

    The kept steps are those that the last step builds on.
    """
    kept, wall = steps[-1].number - steps[0].number, steps[-1].at - steps[0].at
    in_turn = [(a, b) for a, b in pairwise(steps) if a.attempt == b.attempt and a.number % save_steps]
    seconds = statistics.median(after.at - before.at for before, after in in_turn)
    return Goodput(kept * seconds / wall, kept, len(steps) - 1, seconds)


def stall(saving: Sequence[float], plain: Sequence[float], every: int) -> Stall:
    """Return the cost of saves from the step ends of two runs.

    The first run saved once in `every` steps, the second never.
    """
    waits: dict[bool, list[float]] = {True: [], False: []}
    for number, (before, after) in enumerate(pairwise(saving[1:]), start=2):  # without the first step
        waits[number % every == 0].append(after - before)
    begin, cycles = every - 1, len(saving) // every - 1  # full cycles, each with one save
    end = begin + cycles * every
    longer = saving[end] - saving[begin] - (plain[end] - plain[begin])
    step = statistics.median(after - before for before, after in pairwise(plain[1:]))
    return Stall(step, statistics.median(waits[True]) - statistics.median(waits[False]), longer / cycles)


def share_of(turn: int, turns: int, total: int) -> int:
    """Return the share of a turn, so that all turns have about the same."""
    return total * (turn + 1) // turns - total * turn // turns


class Parts:
    """The measurements, with the cut model."""

    def __init__(self, options: Namespace, model: Path, work: Path) -> None:
        self.options, self.model, self.work = options, model, work
        self.turns = min(KILL_TURNS, options.kills)
        most = max(self.share(turn) for turn in range(self.turns))
        self._ends = recovery_to_end.ToTheEnd(work, model, OFTEN, most, options.seed)
        self._parents = recovery_parents.Parents(work, model, OFTEN, options.seed)

    def share(self, turn: int) -> int:
        """Return the kills of a turn."""
        return share_of(turn, self.turns, self.options.kills)

    def to_end(self, backend: str, turn: int) -> recovery_to_end.Turn:
        return self._ends.turn(backend, turn, self.share(turn))

    def parents(self, kind: str, turn: int) -> recovery_parents.Turn:
        return self._parents.turn(kind, turn, self.share(turn))

    def running(self, kind: str, save_steps: int) -> AbstractContextManager[Side]:
        return running(kind, self.work, self.model, save_steps)

    def killed(self, kind: str, turn: int) -> list[Kill]:
        draw, found = random.Random(f"{self.options.seed} kills {turn}"), []
        with self.running(kind, OFTEN) as side:
            while len(found) < self.share(turn):
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
                if side.taken:  # do not kill a run that has not recovered
                    kills += side.kill(rank) is not None
            end = began + 60 * self.options.minutes
            side.insist(lambda: side.taken > 0 and side.steps[-1].at >= end)
            by_hand = side.starts - starts
        return replace(goodput(side.steps[first:], SELDOM), kills=kills, by_hand=by_hand)

    def stall(self, backend: str, _: int) -> Stall:
        saving = self.ends(backend, save_steps=STALL_EVERY)
        return stall(saving, self.ends(backend, save_strategy="no"), STALL_EVERY)

    def ends(self, backend: str, **saving: Any) -> list[float]:
        """Return when the steps of a run ended, as rank 0 recorded it."""
        config = REPO / "accelerate_configs" / f"{FILES[backend]}.yaml"
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
    """Return a row of the table. A goal is met only if the worst kill meets it."""
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
    parser.add_argument("--layers", type=int, default=2, help="keep the first layers of the model")
    parser.add_argument("--kills", type=int, default=20, help=f"kills of a side, in {KILL_TURNS} turns")
    parser.add_argument(
        "--minutes", type=int, default=5, help=f"minutes of a turn; goodput has {GOODPUT_TURNS} turns"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(PARTS), help="only these parts, comma-separated")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if unknown := set(options.only.split(",")) - set(PARTS):
        parser.error(f"--only: unknown: {', '.join(sorted(unknown))}. Allowed: {', '.join(PARTS)}")
    if min(options.kills, options.minutes, options.layers) < 1:
        parser.error("--kills, --minutes and --layers must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    source, chosen = need_model(options.model), options.only.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what was started
    found: dict[str, Any] = {"where": provenance("torch", "transformers", "trl", "accelerate")}
    print(found["where"])
    print(
        f"{options.layers} layers, float32, full training (ddp, fsdp and zero2: LoRA). A step is a row of "
        f"at most {LENGTH} tokens a rank."
    )
    print(f"Saves: every {OFTEN} steps in runs with kills, every {SELDOM} steps for goodput.")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        cut = [sys.executable, str(REPO / "benchmarks" / "cut_model.py"), str(source), "model"]
        run([*cut, "--layers", str(options.layers)], work)
        parts = Parts(options, work / "model", work)
        killed = {kind: partial(parts.killed, kind) for kind in SIDES if kind in chosen}
        good = {kind: partial(parts.goodput, kind) for kind in ("warm", "torchrun") if "goodput" in chosen}
        stalls = {backend: partial(parts.stall, backend) for backend in FILES if "stall" in chosen}
        to_end = {name: partial(parts.to_end, name) for name in recovery_to_end.BACKENDS if name in chosen}
        parents = {kind: partial(parts.parents, kind) for kind in recovery_parents.KINDS if kind in chosen}
        for name, kinds, turns, row, head in (
            ("kills", killed, parts.turns, kills_row,
             ["killed", "recovered", "at a save", "named", "noticed after", "first step after", "goals"]),
            ("goodput", good, GOODPUT_TURNS, goodput_row,
             ["one kill a minute", "goodput", "steps kept", "median step", "kills", "starts by hand"]),
            ("stall", stalls, STALL_TURNS, stall_row,
             [f"a save in {STALL_EVERY} steps", "step", "a save waits", "in steps", "it adds in all"]),
            ("to the end", to_end, parts.turns, partial(recovery_to_end.row, options.kills),
             recovery_to_end.HEAD),
            ("parents", parents, parts.turns, recovery_parents.row, recovery_parents.HEAD),
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
