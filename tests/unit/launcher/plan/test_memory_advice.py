"""What an error about memory advises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes import machine

from launcher.config import Run
from launcher.plan.backend import resolve_backend
from launcher.plan.memory_advice import advice
from launcher.plan.topology import Hardware, resolve_topology

GPUS = machine(gpus=2)


@pytest.mark.parametrize(
    ("hardware", "flags", "tried", "of_batches", "present", "absent"),
    [
        (GPUS, {}, [8], True,
         ["Set batch_size: 4 and gradient_accumulation: 8 (the same global batch), or "
          "auto_find_batch_size: true."],
         ["What needs less"]),
        (GPUS, {"tokens_per_batch": 4096}, [8], True,
         ["Lower tokens_per_batch (4096) and raise gradient_accumulation"], ["batch_size: 4", "auto_find"]),
        (GPUS, {"batch_size": 1}, [1], True,
         ["batch_size 1 is the smallest.", "activation_checkpointing: offload; a block_size below 1024; "
          "peft: true; quantization: int4 (with peft: true); distributed_backend: fsdp, or deepspeed with "
          "launch.zero_stage: 3"],
         ["offload: cpu", "auto_find", "precompute"]),
        (GPUS, {"batch_size": 1, "auto_find_batch_size": True, "distributed_backend": "fsdp", "peft": True,
                "quantization": "int4", "activation_checkpointing": "none"}, [4, 2, 1], True,
         ["auto_find_batch_size tried batch_size 4, 2 and 1; 1 is the smallest.",
          "activation_checkpointing: full;", "launch.offload: cpu."],
         ["peft", "quantization", "distributed_backend"]),
        (GPUS, {"batch_size": 3, "trainer": "kto", "auto_find_batch_size": True,
                "text_column": "a", "prompt_text_column": "b"}, [6, 3], True,
         ["tried batch_size 6 and 3; 3 has no smaller usable divisor", "precompute_ref_log_probs: true"], []),
        (GPUS, {"batch_size": 1, "valid_split": "train", "per_device_eval_batch_size": 64}, [1], True,
         ["What needs less memory: per_device_eval_batch_size: 1;"], []),
        (GPUS, {"distributed_backend": "deepspeed", "auto_find_batch_size": True}, [8], False,
         ["Memory ran out while the model was loaded or saved", "peft: true", "launch.offload: cpu"],
         ["block_size below", "activation_"]),
        (machine(), {"peft": True, "quantization": "int4", "num_processes": 2, "distributed_backend": "fsdp"},
         [8], False,
         ["Memory ran out while the model was loaded or saved", "Use larger GPUs."], ["What needs less"]),
    ],
)  # fmt: skip
def test_advice(
    asked: Callable[..., Run], packages: object, hardware: Hardware, flags: dict[str, Any], tried: list[int],
    of_batches: bool, present: list[str], absent: list[str],
) -> None:  # fmt: skip
    run = asked(**{"batch_size": 8, "distributed_backend": "ddp", **flags})
    topology = resolve_topology(run.launch, hardware, {})
    text = "\n".join(advice(run, resolve_backend(run, topology), topology, tried, of_batches))
    for words in present:
        assert words in text
    for words in absent:
        assert words not in text
