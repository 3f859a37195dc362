"""Find the step at which a loss or gradient norm becomes NaN or infinite, and write its batches to a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainers.rank import no_links
from trainers.rank.process import log_folder, rank
from trainers.rank.protocol import run_of
from trainers.storage import run_files


@dataclass
class StepRecord:
    """The batches, losses and gradient norm of one optimiser step on this rank."""

    step: int
    batches: list[tuple[dict[str, Any], torch.Tensor]] = field(default_factory=list)  # inputs, loss
    grad_norm: Any = None

    def flag(self, norms_count: bool) -> torch.Tensor:
        """Return whether a loss or the gradient norm is not finite, as a tensor: no wait for the GPU."""
        values = [loss.detach().float().reshape(()) for _, loss in self.batches]
        if norms_count and self.grad_norm is not None:
            norm = self.grad_norm
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            values.append(torch.as_tensor(norm, dtype=torch.float32, device=values[0].device).reshape(()))
        return ~torch.isfinite(torch.stack(values)).all() if values else torch.tensor(False)


class FiniteWatch:
    """A check of losses and gradient norms in each step.

    On a GPU the result of a step is read one step later, when it is ready, so that the rank never waits for
    the GPU. wait() reads it at once, before anything is saved.
    """

    def __init__(self, fp16: bool) -> None:
        self.norms_count = not fp16  # with fp16 the scaler skips a step whose gradients are infinite
        self.current = StepRecord(0)
        self.previous: tuple[StepRecord, torch.Tensor, Any] | None = None
        self.bad: StepRecord | None = None

    def begin(self, step: int) -> None:
        """Start the record of a step."""
        self.current = StepRecord(step)

    def record_loss(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """Record a micro-batch and its loss."""
        self.current.batches.append((dict(inputs), loss))

    def record_norm(self, norm: Any) -> None:
        """Record the gradient norm of the step."""
        self.current.grad_norm = norm

    def end(self) -> int:
        """End the step. Returns 1 if the values of a step are not finite, else 0 (on a GPU one step late)."""
        flag = self.current.flag(self.norms_count)
        if flag.device.type == "cpu":
            self.previous = (self.current, flag, None)
            return self.wait()
        bad = self.wait()
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self.previous = (self.current, host, done)
        return bad

    def wait(self) -> int:
        """Return 1 if the values of a step are not finite, else 0. Waits for the GPU."""
        if self.previous is not None:
            record, flag, done = self.previous
            if done is not None:
                done.synchronize()
            if bool(flag):
                self.bad = record
            self.previous = None
        return int(self.bad is not None)

    @property
    def bad_step(self) -> int:
        """The step that was not finite. It is the same on every rank, since all ranks end the same steps."""
        return (self.bad or self.current).step

    def write(self, folder: Path, tokenizer: Any) -> Path | None:
        """Write the batches of this rank that caused it.

        Returns the path of the file, or None if another rank caused it.
        """
        record = self.bad
        if record is None:
            return None
        bad = [(inputs, loss) for inputs, loss in record.batches if not torch.isfinite(loss).all()]
        lines = []
        for inputs, loss in bad or record.batches:  # all batches, if only the gradients are not finite
            ids = {n: t.tolist() for n, t in inputs.items() if n.endswith("ids") and hasattr(t, "tolist")}
            text = {n: [tokenizer.decode(row) for row in rows] for n, rows in ids.items() if n == "input_ids"}
            lines.append({"loss": repr(float(loss)), "text": text.get("input_ids"), **ids})
        name = f"not-finite-step-{record.step}-rank-{rank()}.json"
        norm = None if record.grad_norm is None else repr(float(record.grad_norm))
        text_of_file = json.dumps({"step": record.step, "grad_norm": norm, "batches": lines}, indent=1)
        logs = log_folder()
        if logs is None:
            run_files.write(folder, name, text_of_file)
            return folder / name
        no_links.write(run_of(logs), logs / name, text_of_file)
        return logs / name
