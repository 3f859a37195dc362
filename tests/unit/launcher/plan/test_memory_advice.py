"""When memory ran out, only changes that save memory in this run are advised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes import machine

from launcher.config import load_run
from launcher.plan.backend import resolve_backend
from launcher.plan.memory_advice import advice
from launcher.plan.topology import Hardware, resolve_topology

CPU, GPUS = machine(), machine(gpus=2)
SHORTER, PEFT, INT4 = "a block_size below 1024", "peft: true", "quantization: int4 (with peft: true)"
SHARD = "distributed_backend: fsdp, or deepspeed with launch.zero_stage: 3 (over more GPUs)"
FULL, OFFLOAD = "activation_checkpointing: full", "activation_checkpointing: offload"
PRECOMPUTE, HOST = "precompute_ref_log_probs: true", "launch.offload: cpu"
Advise = Callable[..., list[str]]


@pytest.fixture
def advise(work: object, packages: object) -> Advise:
    """`advise(GPUS, batch_size=1)` returns the lines for a run of sft under ddp with this change."""

    def lines(hardware: Hardware, of_batches: bool = True, **flags: Any) -> list[str]:
        given = {"trainer": "sft", "model": "model", "num_processes": 2, "distributed_backend": "ddp",
                 "batch_size": 1, **flags}  # fmt: skip
        run = load_run(None, {name: str(value) for name, value in given.items()})
        topology = resolve_topology(run.launch, hardware, {})
        return advice(run, resolve_backend(run, topology), topology, [run.train.batch_size], of_batches)

    return lines


ZERO_2 = {"distributed_backend": "deepspeed", "zero_stage": 2}
ZERO_3 = {"distributed_backend": "deepspeed", "zero_stage": 3}


@pytest.mark.parametrize(
    ("hardware", "flags", "fixes"),
    [
        (CPU, {}, [SHORTER, PEFT, INT4, SHARD]),
        (GPUS, {}, [OFFLOAD, SHORTER, PEFT, INT4, SHARD]),
        (GPUS, {"activation_checkpointing": "offload"}, [SHORTER, PEFT, INT4, SHARD]),
        (GPUS, {"activation_checkpointing": "none"}, [FULL, SHORTER, PEFT, INT4, SHARD]),
        (GPUS, {"activation_checkpointing": "selective"}, [FULL, SHORTER, PEFT, INT4, SHARD]),
        (CPU, {"valid_split": "v", "per_device_eval_batch_size": 1}, [SHORTER, PEFT, INT4, SHARD]),
        (CPU, {"valid_split": "v", "per_device_eval_batch_size": 2},
         ["per_device_eval_batch_size: 1", SHORTER, PEFT, INT4, SHARD]),
        (CPU, {"peft": True, "quantization": "none"}, [SHORTER, "quantization: int4", SHARD]),
        (CPU, {"peft": True, "quantization": "int4"}, [SHORTER, SHARD]),
        (CPU, {"trainer": "dpo"}, [SHORTER, PEFT, INT4, PRECOMPUTE, SHARD]),
        (CPU, {"trainer": "dpo", "precompute_ref_log_probs": True}, [SHORTER, PEFT, INT4, SHARD]),
        (CPU, {"trainer": "dpo", "peft": True}, [SHORTER, SHARD]),  # the base model is the reference
        (GPUS, ZERO_2, [OFFLOAD, SHORTER, PEFT, INT4, SHARD]),  # it does not shard the weights
        (GPUS, ZERO_3, [OFFLOAD, SHORTER, PEFT, INT4, HOST]),
        (GPUS, {"distributed_backend": "deepspeed"}, [OFFLOAD, SHORTER, PEFT, INT4, HOST]),  # stage 3
        (GPUS, {"distributed_backend": "fsdp"}, [OFFLOAD, SHORTER, PEFT, INT4, HOST]),
        (GPUS, {"distributed_backend": "fsdp", "offload": "cpu"}, [OFFLOAD, SHORTER, PEFT, INT4]),
        (CPU, {"distributed_backend": "fsdp"}, [SHORTER, PEFT, INT4]),
    ],
    ids=str,
)  # fmt: skip
def test_only_what_helps_in_this_run_is_advised(
    advise: Advise, hardware: Hardware, flags: dict[str, Any], fixes: list[str]
) -> None:
    why, what = advise(hardware, **flags)
    assert why == "batch_size 1 is the smallest."
    assert what == f"What needs less memory: {'; '.join(fixes)}."


@pytest.mark.parametrize("flags", [{}, {"batch_size": 8}, {"tokens_per_batch": 4096}], ids=str)
def test_while_the_model_was_loaded_nothing_about_batches_is_advised(
    advise: Advise, flags: dict[str, Any]
) -> None:
    why, what = advise(GPUS, of_batches=False, valid_split="v", per_device_eval_batch_size=64, **flags)
    assert why.startswith("Memory ran out while the model was loaded or saved")
    assert what == f"What needs less memory: {PEFT}; {INT4}; {SHARD}."


def test_the_batch_is_halved_only_if_the_search_has_not_tried_it(advise: Advise) -> None:
    assert advise(CPU, batch_size=8)[0].startswith("Set batch_size: 4 and gradient_accumulation: 8")
    assert "Set batch_size" not in "".join(advise(CPU, batch_size=8, auto_find_batch_size=True))
