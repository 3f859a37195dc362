"""Advise what to change when memory ran out. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.config import Run
from launcher.plan.backend import AUTOTRAIN_ZERO_STAGE, Backend
from launcher.plan.batch_search import next_smaller
from launcher.plan.topology import Topology
from trainers.config.consistency import smallest_batch
from trainers.config.schema import TrainConfig


@dataclass(frozen=True)
class Case:
    """The facts that decide which fixes help."""

    train: TrainConfig
    backend: Backend
    topology: Topology
    offload: str
    zero_stage: int

    @property
    def shards_weights(self) -> bool:
        name = self.backend.name
        return name == "fsdp" or (name == "deepspeed" and self.zero_stage == 3)


@dataclass(frozen=True)
class Fix:
    """A change that saves memory, and the condition under which it does."""

    text: Callable[[Case], str]
    helps: Callable[[Case], bool]
    of_batches: bool = False  # it reduces the memory of a batch, not that of the model


# fmt: off
FIXES = (
    Fix(lambda c: f"per_device_eval_batch_size: {c.train.batch_size}", lambda c:
        (c.train.per_device_eval_batch_size or 0) > c.train.batch_size, of_batches=True),
    Fix(lambda c: "activation_checkpointing: full",
        lambda c: c.train.activation_checkpointing in ("none", "selective"), of_batches=True),
    Fix(lambda c: "activation_checkpointing: offload",
        lambda c: c.train.activation_checkpointing == "full" and c.topology.on_gpu, of_batches=True),
    Fix(lambda c: f"a block_size below {c.train.sequence_length}", lambda c: True, of_batches=True),
    Fix(lambda c: "peft: true", lambda c: not c.train.peft),
    Fix(lambda c: "quantization: int4" + ("" if c.train.peft else " (with peft: true)"),
        lambda c: c.train.quantization is None),
    Fix(lambda c: "precompute_ref_log_probs: true", lambda c: c.train.kind.reference
        and not c.train.peft and not c.train.precompute_ref_log_probs),
    Fix(lambda c: "distributed_backend: fsdp, or deepspeed with launch.zero_stage: 3 (over more GPUs)",
        lambda c: not c.shards_weights),
    Fix(lambda c: "launch.offload: cpu",
        lambda c: c.shards_weights and c.offload == "none" and c.topology.on_gpu),
)
# fmt: on


def advice(
    run: Run, backend: Backend, topology: Topology, tried: list[int], of_batches: bool = True
) -> list[str]:
    """Return lines that say what to do about memory that ran out.

    `tried`: the batch sizes that ran out of memory, in order. `of_batches`: memory ran out in a micro-batch,
    not while the model was loaded or saved.
    """
    budget = run.train.token_budget
    if of_batches and budget is not None:
        return [f"Lower tokens_per_batch ({budget}) and raise gradient_accumulation by as much."]
    smaller = next_smaller(run.train)
    if of_batches and smaller and not run.train.auto_find_batch_size:
        values = "batch_size: {} and gradient_accumulation: {}".format(*smaller)
        return [f"Set {values} (the same global batch), or auto_find_batch_size: true."]
    stage = run.launch.zero_stage or AUTOTRAIN_ZERO_STAGE
    case = Case(run.train, backend, topology, run.launch.offload, stage)
    fixes = [fix.text(case) for fix in FIXES if fix.helps(case) and (of_batches or not fix.of_batches)]
    why = (
        _exhausted(run.train, tried)
        if of_batches
        else "Memory ran out while the model was loaded or saved: a smaller batch_size does not help."
    )
    return [why, f"What needs less memory: {'; '.join(fixes)}." if fixes else "Use larger GPUs."]


def _exhausted(train: TrainConfig, tried: list[int]) -> str:
    """Return a line with the batch sizes that were tried, and why there is no smaller one."""
    *most, last = map(str, tried)
    sizes = f"{', '.join(most)} and {last}" if most else last
    below = "is the smallest" if last == str(smallest_batch(train)) else "has no smaller usable divisor"
    if train.auto_find_batch_size:
        return f"auto_find_batch_size tried batch_size {sizes}; {last} {below}."
    return f"batch_size {last} {below}."
