"""The parts ddp, fsdp and zero2 of recovery.py: runs that are killed on their way to the end.

A run trains a LoRA adapter with a constant scheduler, saves it, and merges it. It is killed several times in
training, once in the final save and once in the merge. Its weights and losses are compared, bit for bit,
with those of a run of the same backend that nothing disturbed.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from killed_run import RANKS, Kill, Side, running
from measure import Failed, spread

BACKENDS = {"ddp": "ddp", "fsdp": "fsdp", "zero2": "deepspeed"}
JOB = {"peft": True, "lora_dropout": 0.1, "merge_adapter": True, "scheduler": "constant", "lr": 1e-3}
TRAINING, FINAL_SAVE, MERGE = "training", "final save", "merge"
AFTER_STEPS = 6  # the most steps between two kills
SOON, FIRST = 2.0, 8.0  # goals: seconds until noticed, and until a step ends


def sections(backend: str, steps: int) -> dict[str, dict[str, Any]]:
    """Return the values of a run's config, in its sections."""
    params = {**JOB, "distributed_backend": BACKENDS[backend], "max_steps": steps}
    return {"params": params, "launch": {"zero_stage": 2} if backend == "zero2" else {}}


@dataclass(frozen=True)
class Turn:
    kills: list[Kill]
    equal: bool  # the run ended with 0, and left the same weights and losses as the undisturbed run


def targets(kills: int) -> list[str]:
    """Return what the kills of a turn hit, in their order: the last two the final save and the merge."""
    return ([TRAINING] * (kills - 2) + [FINAL_SAVE, MERGE])[-kills:]


def left_behind(run: Path) -> dict[str, Any]:
    """Return the hash of each file with weights, and the losses of all steps in the order of the log."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.glob("*.safetensors")}
    return {**weights, "losses": losses}


class ToTheEnd:
    """Runs of a backend that are killed `most` times each, at most."""

    def __init__(self, work: Path, model: Path, save_steps: int, most: int, seed: int) -> None:
        self.work, self.model, self.save_steps, self.seed = work, model, save_steps, seed
        enough = AFTER_STEPS * max(most - 1, 1)  # steps for all kills in training, with some left
        self.steps = -(-enough // save_steps) * save_steps
        self.undisturbed: dict[str, dict[str, Any]] = {}

    def turn(self, backend: str, number: int, kills: int) -> Turn:
        """Kill a run `kills` times, and compare what it leaves."""
        more = {"sections": sections(backend, self.steps)}
        if backend not in self.undisturbed:
            with running("warm", self.work, self.model, self.save_steps, **more) as side:
                finish(side)
                self.undisturbed[backend] = left_behind(side.folder / "run")
        draw = random.Random(f"{self.seed} backends {number}")
        with running("warm", self.work, self.model, self.save_steps, **more) as side:
            found = list(filter(None, [kill_in(side, target, draw) for target in targets(kills)]))
            try:
                finish(side)
            except Failed as reason:
                print(f"{backend}: a run ended: {reason.reason}", file=sys.stderr, flush=True)
                return Turn(found, False)
            left = left_behind(side.folder / "run")
        wanted = self.undisturbed[backend]
        if differ := [name for name in left | wanted if left.get(name) != wanted.get(name)]:
            print(f"{backend}: a run differs in {', '.join(differ)}", file=sys.stderr, flush=True)
        return Turn(found, not differ)


def finish(side: Side) -> None:
    """Wait until the launch has ended.

    Raises:
        Failed: not with 0.
    """
    side.until(lambda: False)
    if side.process.poll() != 0:
        raise Failed(Path(side.errors.name).read_text(errors="replace"))


def kill_in(side: Side, target: str, draw: random.Random) -> Kill | None:
    """Wait for the target, kill a rank at a random moment in it, and return what followed."""
    if target == TRAINING:
        steps, pause, rank = draw.randint(2, AFTER_STEPS), draw.random(), draw.randrange(RANKS)
        if not side.until(lambda: side.taken >= steps):
            return None
        moment = time.monotonic() + pause
        return side.kill(rank) if side.until(lambda: time.monotonic() >= moment) else None
    attempt = side.attempt
    if target == FINAL_SAVE:
        part, rank, pause = side.folder / "run" / "final.part", draw.randrange(RANKS), draw.uniform(0.0, 0.03)
        reached = side.until(part.exists)
    else:
        rank, pause = 0, draw.uniform(0.0, 0.5)  # only rank 0 merges
        reached = side.until(lambda: side.phase(0) == MERGE)
    time.sleep(pause)
    done = (
        (lambda: side.ending is not None) if target == FINAL_SAVE else (lambda: MERGE in (side.ending or []))
    )
    return side.followed(rank, False, lambda: side.attempt > attempt and done()) if reached else None


HEAD = ["killed", "recovered", "at a save", "in the final save", "in the merge", "named", "noticed after",
        "first step after", "saved or merged after", "runs bit-equal", "goals"]  # fmt: skip


def row(planned: int, backend: str, turns: Sequence[Turn]) -> list[str]:
    """Return a row of the table. A goal is met only if the worst kill meets it, and all `planned` hit."""
    kills = [kill for turn in turns for kill in turn.kills]
    late = [kill for kill in kills if kill.phase in ("end", "saved", MERGE)]
    training = [kill for kill in kills if kill not in late]
    noticed = [kill.noticed for kill in kills if kill.noticed is not None]
    first = [kill.first_step for kill in training if kill.first_step is not None]
    back = [kill for kill in kills if kill.first_step is not None]
    done = [kill.first_step for kill in back if kill.phase in ("end", MERGE)]  # "saved": nothing to repeat
    groups = [kills, [kill for kill in kills if kill.at_save],
              [kill for kill in kills if kill.phase == "end"],
              [kill for kill in kills if kill.phase == MERGE]]  # fmt: skip
    cells = [f"{sum(k.first_step is not None for k in group)} of {len(group)}" for group in groups]
    cells += [f"{sum(kill.named for kill in kills)} of {len(kills)}"]
    cells += [f"{spread(values, '.2f')} s" if values else "never" for values in (noticed, first, done)]
    equal = sum(turn.equal for turn in turns)
    met = len(back) == len(noticed) == planned and equal == len(turns)
    met = met and all(groups) and max(noticed) < SOON and max(first, default=FIRST + 1) <= FIRST
    goal = f"all, {SOON:g} s, {FIRST:g} s, equal: {'met' if met else 'MISSED'}"
    return [f"phalanx, {backend}", *cells, f"{equal} of {len(turns)}", goal]
