"""Report the progress of a run: metrics.jsonl, the live line on the terminal, and the tracker."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainers.config.mix import TAKEN
from trainers.output.trackers import Tracker
from trainers.storage import run_files
from trainers.storage.metrics_log import read_metrics
from trainers.storage.run_folder import METRICS, PROGRESS


class Report(TrainerCallback):
    """A callback of rank 0, which writes each logged value to metrics.jsonl, the tracker and the live line.

    tokens: the tokens of all ranks since the run began, over all resumes. tokens_per_second: the tokens since
    the last log, divided by the time of the optimiser steps since then (without evaluation and saving).
    """

    def __init__(
        self,
        folder: Path,
        live: bool,
        resumed_step: int,
        tracker: Tracker | None = None,
        trained: bool = False,
    ) -> None:
        """`trained`: only the evaluation on the test split is left."""
        self.folder, self.live, self.tracker, self.trained = folder, live, tracker, trained
        self.base_tokens = self._keep_until(resumed_step)
        self.tokens = self.base_tokens
        self.step_seconds = self.logged_seconds = 0.0
        self.step_began: float | None = None
        self.steps = 0
        self.progress: dict[str, Any] = {}
        self.latest: list[str] = []  # loss and speed of the last log, for the live line

    def _keep_until(self, step: int) -> int:
        """Remove what was logged after `step`, from which the run resumes (0: remove everything).

        Returns the tokens up to that step.
        """
        path = self.folder / METRICS
        if not path.exists():
            return 0
        kept = []
        for entry in read_metrics(self.folder):
            # This start logs these again.
            ended = "test_loss" in entry or ("train_runtime" in entry and not self.trained)
            if step and entry["step"] <= step and not ended:
                kept.append(entry)
        run_files.write(self.folder, METRICS, "".join(_json_line(entry) for entry in kept))
        counts = [entry.get("tokens") for entry in kept]
        return max((count for count in counts if isinstance(count, int)), default=0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.step_began is None:
            self.step_began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.step_began is not None:
            self.step_seconds += time.monotonic() - self.step_began
            self.step_began = None
        self.steps += 1
        if self.live and state.global_step < state.max_steps:
            self._print(self._line(state), lasting=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        values = _named(logs)
        total = self._total_tokens(values)
        if total is not None:
            values["tokens"] = total
            seconds = self.step_seconds - self.logged_seconds
            if seconds > 0 and total > self.tokens:
                values["tokens_per_second"] = round((total - self.tokens) / seconds, 1)
            self.tokens, self.logged_seconds = total, self.step_seconds
        values = {"epoch": values.pop("epoch", state.epoch), **values}
        record = {"step": state.global_step, **values}
        run_files.append(self.folder, METRICS, _json_line(record))
        self._note_progress(state, record)
        if self.tracker is not None:
            self.tracker.log(state.global_step, values)
        self._show(state, record)

    def _total_tokens(self, values: dict[str, Any]) -> int | None:
        """Remove the count of tokens from the values, and return it as a total over all resumes."""
        whole_run = values.pop("num_input_tokens_seen", None)  # from transformers: the checkpoint keeps it
        this_start = values.pop("num_tokens", None)  # from TRL: starts from 0 at each start
        if this_start is not None:
            return self.base_tokens + int(this_start)
        return None if whole_run is None else int(whole_run)

    def _show(self, state: TrainerState, record: dict[str, Any]) -> None:
        evaluated = next((name for name in ("eval_loss", "test_loss") if name in record), None)
        if evaluated is not None:
            text = f"step {state.global_step}/{state.max_steps}  {evaluated} {record[evaluated]:.4f}"
            text += _of_sources(record, evaluated.removesuffix("loss"))
            self._print(text, lasting=True)
        elif "loss" in record:
            self.latest = [f"loss {float(record['loss']):.4f}"]
            if "tokens_per_second" in record:
                self.latest.append(f"{record['tokens_per_second']:.0f} tokens/s")
            self._print(self._line(state), lasting=state.global_step >= state.max_steps)

    def _note_progress(self, state: TrainerState, record: dict[str, Any]) -> None:
        """Write the progress of the run next to the launcher's files, with the last known loss and speed."""
        self.progress |= {name: record[name] for name in ("loss", "tokens_per_second") if name in record}
        known = {"step": state.global_step, "max_steps": state.max_steps, "seconds_left": self._left(state)}
        run_files.write(self.folder, PROGRESS, _json_line(self.progress | known))

    def _left(self, state: TrainerState) -> int:
        """Return the seconds to the last step: the steps left times the mean time of a step so far."""
        return int((state.max_steps - state.global_step) * self.step_seconds / max(self.steps, 1))

    def _line(self, state: TrainerState) -> str:
        """Return the live line: step, loss, tokens/s and ETA."""
        left = self._left(state)
        parts = [
            f"step {state.global_step}/{state.max_steps}",
            *self.latest,
            f"ETA {left // 60}:{left % 60:02d}",
        ]
        return "  ".join(parts)

    def _print(self, text: str, lasting: bool) -> None:
        """Print a line. On a terminal the next one overwrites it, unless it is `lasting`."""
        if self.live:
            print(f"\r\033[K{text}", end="\n" if lasting else "", flush=True)
        else:
            print(text, flush=True)


def _of_sources(record: dict[str, Any], prefix: str) -> str:
    """Return the losses of the sources of a mix, as text for the live line."""
    found = {
        name.removeprefix(prefix).removesuffix("_loss"): value
        for name, value in record.items()
        if name.startswith(prefix) and name.endswith("_loss")
    }
    losses = [f"{name} {value:.4f}" for name, value in found.items() if name not in TAKEN]
    return f" ({', '.join(losses)})" if losses else ""


def _named(logs: dict[str, Any]) -> dict[str, Any]:
    """Return the values under their names.

    TRL begins the names of its values with eval_ in every evaluation, even in that of the test split.
    """
    if "test_loss" not in logs:
        return dict(logs)
    return {
        f"test_{name.removeprefix('eval_')}" if name.startswith("eval_") else name: value
        for name, value in logs.items()
    }


def _json_line(record: dict[str, Any]) -> str:
    """Return one line of metrics.jsonl. JSON has no NaN and no infinity, so they become strings."""
    plain = {
        name: json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(plain, allow_nan=False) + "\n"
