"""What to change when memory ran out. Pure."""

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
    """What the mends look at."""

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
class Mend:
    """A change that saves memory, and when there is something to save by it."""

    text: Callable[[Case], str]
    helps: Callable[[Case], bool]
    of_batches: bool = False  # it shrinks what a batch needs, and not what the model needs


# fmt: off
MENDS = (
    Mend(lambda c: f"per_device_eval_batch_size: {c.train.batch_size}", lambda c:
         (c.train.per_device_eval_batch_size or 0) > c.train.batch_size, of_batches=True),
    Mend(lambda c: "activation_checkpointing: full",
         lambda c: c.train.activation_checkpointing in ("none", "selective"), of_batches=True),
    Mend(lambda c: "activation_checkpointing: offload",
         lambda c: c.train.activation_checkpointing == "full" and c.topology.on_gpu, of_batches=True),
    Mend(lambda c: f"a block_size below {c.train.sequence_length}", lambda c: True, of_batches=True),
    Mend(lambda c: "peft: true", lambda c: not c.train.peft),
    Mend(lambda c: "quantization: int4" + ("" if c.train.peft else " with it"),
         lambda c: c.train.quantization is None),
    Mend(lambda c: "precompute_ref_log_probs: true", lambda c: c.train.kind.reference
         and not c.train.peft and not c.train.precompute_ref_log_probs),
    Mend(lambda c: "distributed_backend: fsdp, or deepspeed with launch.zero_stage: 3 (over more GPUs)",
         lambda c: not c.shards_weights),
    Mend(lambda c: "launch.offload: cpu",
         lambda c: c.shards_weights and c.offload == "none" and c.topology.on_gpu),
)


def advice(
    run: Run, backend: Backend, topology: Topology, tried: list[int], of_batches: bool = True
) -> list[str]:
    """Lines that say what to do about memory that ran out.

    `tried`: the batch sizes that did, in their order. `of_batches`: a batch needed it, not loading or saving.
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
    mends = [mend.text(case) for mend in MENDS if mend.helps(case) and (of_batches or not mend.of_batches)]
    why = (
        _exhausted(run.train, tried)
        if of_batches
        else "No batch needed it, but loading or saving the model: a smaller batch_size does not help."
    )
    return [why, f"What needs less memory: {'; '.join(mends)}." if mends else "Use larger GPUs."]


def _exhausted(train: TrainConfig, tried: list[int]) -> str:
    """What was tried, and why there is nothing below."""
    *most, last = map(str, tried)
    sizes = f"{', '.join(most)} and {last}" if most else last
    below = "is the smallest" if last == str(smallest_batch(train)) else "has no smaller divisor of use"
    if train.auto_find_batch_size:
        return f"auto_find_batch_size tried batch_size {sizes}; {last} {below}."
    return f"batch_size {last} {below}."
