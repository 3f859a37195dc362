"""Resolves distributed_backend, and refuses what does not go together.

The table RULES is the one place for both.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.config import Run
from launcher.plan.memory import predict_bytes_per_rank, size_of_model
from launcher.plan.topology import Topology
from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.model.reentrancy import reentrancy
from trainers.storage.run_folder import version_of
from trainers.storage.shipped import ACCELERATE_CONFIGS, DEEPSPEED_CONFIGS

AUTOTRAIN_ZERO_STAGE = 3  # what AutoTrain's distributed_backend: deepspeed ran
MEMORY_SHARE = 0.8  # part of a device's memory that the weights, gradients and optimiser may fill

# Optimisers that are not in torch or transformers: (their names, the package, how pip gets it).
BITSANDBYTES = r"(paged_)?(adamw|ademamix|lion)_\d+bit|ademamix|\w+_bnb\w*"
OPTIMIZER_PACKAGES = (
    (BITSANDBYTES, "bitsandbytes", "'phalanx[quantization]'"),
    (r"adamw_torch_[48]bit", "torchao", "torchao"),
    (r"schedule_free_\w+", "schedulefree", "schedulefree"),
    (r"stable_adamw", "torch-optimi", "torch-optimi"),
    (r"grokadamw", "grokadamw", "grokadamw"),
    (r"(ada)?lomo", "lomo-optim", "lomo-optim"),
    (r"adamw_anyprecision", "torchdistx", "torchdistx"),
    (r"adamw_torch_xla", "torch-xla", "torch-xla"),
    (r"adamw_torch_npu_fused", "torch-npu", "torch-npu"),
)


@dataclass(frozen=True)
class Backend:
    """The decision: which backend, why, and the static files that own its policy."""

    name: str  # ddp, fsdp, deepspeed or none
    reason: str
    template: Path
    deepspeed_template: Path | None = None


@dataclass(frozen=True)
class Case:
    """What the rules look at."""

    backend: str
    train: TrainConfig
    topology: Topology
    zero_stage: int | None
    sharding: str | None
    offload: str

    @property
    def several(self) -> bool:
        return self.topology.num_processes > 1


@dataclass(frozen=True)
class Rule:
    """A pair that does not go together: the key to blame, why, and the nearest right choice."""

    key: str
    refuses: Callable[[Case], bool]
    reason: str
    mend: str


def installed(distribution: str) -> bool:
    """Whether a distribution is installed, without importing it."""
    return version_of(distribution) is not None


def _weak_gpu(case: Case) -> bool:
    return any(gpu.capability < (8, 0) for gpu in case.topology.hardware.gpus)


def _optimizer(names: str, without: str = "") -> Callable[[Case], bool]:
    """Whether the optimiser is one of these names, and the package that has it is not installed."""
    return lambda c: bool(re.fullmatch(names, c.train.optimizer)) and not (without and installed(without))


def _no_compiler(case: Case) -> bool:
    """inductor writes C++ for a CPU; Triton writes a little C around its kernels."""
    found = (
        ("cc", "gcc", "clang", os.environ.get("CC"))
        if case.topology.on_gpu
        else (os.environ.get("CXX", "g++"),)
    )
    return not any(name and shutil.which(name) for name in found)


# fmt: off
RULES = (
    Rule("distributed_backend", lambda c: c.backend == "none" and c.several,
         "none runs one process, and num_processes asks for more.", "Use ddp, or num_processes: 1."),
    Rule("distributed_backend", lambda c: c.backend == "deepspeed" and not installed("deepspeed"),
         "deepspeed is not installed.", "pip install 'phalanx[deepspeed]', or use fsdp."),
    Rule("launch.zero_stage", lambda c: c.zero_stage is not None and c.backend != "deepspeed",
         "ZeRO stages belong to distributed_backend: deepspeed.", "Set that, or remove zero_stage."),
    Rule("launch.sharding", lambda c: c.sharding is not None and c.backend != "fsdp",
         "sharding belongs to distributed_backend: fsdp.", "Set that, or remove sharding."),
    Rule("launch.sharding", lambda c: c.sharding == "hybrid_shard" and c.topology.num_machines < 2,
         "hybrid_shard replicates across machines, and there is one.", "Use full_shard."),
    Rule("launch.sharding", lambda c: c.sharding == "hybrid_shard" and not c.topology.on_gpu,
         "accelerate's device mesh needs GPUs, and there is none.", "Use full_shard."),
    Rule("launch.offload", lambda c: c.offload == "cpu" and c.backend not in ("fsdp", "deepspeed"),
         "only fsdp and deepspeed can offload.", "Use distributed_backend: fsdp, or offload: none."),
    Rule("launch.offload", lambda c: c.offload == "cpu" and c.backend == "fsdp" and not c.topology.on_gpu,
         "there is no GPU, so the parameters are in host memory already.", "Use offload: none."),
    Rule("launch.offload", lambda c: c.offload == "cpu" and c.zero_stage == 1,
         "ZeRO-1 is not shipped with offload.", "Use zero_stage: 2."),
    Rule("quantization", lambda c: c.train.quantization is not None and not installed("bitsandbytes"),
         "bitsandbytes is not installed.", "pip install 'phalanx[quantization]', or quantization: null."),
    Rule("quantization", lambda c: c.train.quantization == "int8"
         and (c.backend == "fsdp" or c.zero_stage == 3),
         "int8 weights cannot be sharded.", "Use int4, distributed_backend: ddp, or launch.zero_stage: 2."),
    Rule("quantization", lambda c: c.train.quantization == "int8" and c.several and not c.topology.on_gpu,
         "int8 on CPU runs in one process only.", "Use int4, or num_processes: 1."),
    Rule("precompute_ref_log_probs", lambda c: c.train.precompute_ref_log_probs and c.backend == "fsdp"
         and c.train.peft and c.train.model_ref is None and c.topology.on_gpu,
         "with an adapter the base model is the reference already, and under fsdp it is not on the GPU yet.",
         "Use precompute_ref_log_probs: false; it costs no memory."),
    *(Rule("optimizer", _optimizer(names, without=package),
           f"it is part of {package}, which is not installed.", f"pip install {pip}, or use adamw_torch.")
      for names, package, pip in OPTIMIZER_PACKAGES),
    Rule("optimizer", _optimizer(r"(galore|apollo)_\w+"),
         "it needs optim_target_modules, which no field here sets.", "Use adamw_torch, with peft: true."),
    Rule("optimizer", lambda c: c.backend == "fsdp" and _optimizer(f"{BITSANDBYTES}|adafactor|adagrad")(c),
         "it cannot update weights that fsdp has sharded.",
         "Use adamw_torch_fused, or another distributed_backend."),
    Rule("optimizer", lambda c: c.backend == "deepspeed" and c.train.optimizer == "adafactor",
         "DeepSpeed joins the weights to one row, of which Adafactor has no rows and columns to keep: it "
         "would train otherwise than on one process.", "Use adamw_torch, or distributed_backend: ddp."),
    Rule("optimizer", lambda c: c.backend == "deepspeed" and c.train.optimizer == "adagrad",
         "it makes its state before DeepSpeed has split the weights, and fails.",
         "Use adamw_torch, or distributed_backend: ddp."),
    Rule("optimizer", lambda c: c.train.optimizer.startswith("paged_") and not c.topology.on_gpu,
         "a paged optimiser moves its state out of a full GPU, and there is none.",
         "Use adamw_torch, or the name without paged_."),
    Rule("activation_checkpointing", lambda c: c.train.activation_checkpointing == "offload"
         and not c.topology.on_gpu,
         "there is no GPU, so activations are in host memory already.", "Use full."),
    Rule("activation_checkpointing", lambda c: c.train.activation_checkpointing == "selective"
         and reentrancy(c.zero_stage == 3, c.train.peft)[0],
         f"selective is not reentrant, and {reentrancy(True, True)[1]}.",
         "Use full, launch.zero_stage: 2, or distributed_backend: fsdp."),
    Rule("torch_compile", lambda c: c.train.torch_compile and c.zero_stage == 3,
         "DeepSpeed's hooks cut each layer into pieces, which torch compiles anew for every layer until it "
         "gives up.", "Use torch_compile: false, launch.zero_stage: 2, or distributed_backend: fsdp."),
    Rule("torch_compile", lambda c: c.train.torch_compile and _no_compiler(c),
         "there is no compiler: it needs g++ on a CPU, and gcc or clang beside a GPU.",
         "Install one, or use torch_compile: false."),
    Rule("use_kernels", lambda c: c.train.use_kernels and not c.topology.on_gpu,
         "the hub's kernels are for GPUs, and there is none.", "Use use_kernels: false."),
    Rule("use_kernels", lambda c: c.train.use_kernels and not installed("kernels"),
         "the package kernels is not installed.", "pip install kernels, or use_kernels: false."),
    Rule("mixed_precision", lambda c: c.train.mixed_precision == "fp16" and not c.topology.on_gpu,
         "a CPU has no fp16 training.", "Use mixed_precision: null."),
    Rule("mixed_precision", lambda c: c.train.mixed_precision == "bf16" and not c.topology.on_gpu
         and not c.topology.hardware.cpu_bf16,
         "this CPU has no bf16 instructions (avx512_bf16 or amx_bf16).", "Use mixed_precision: null."),
    Rule("mixed_precision", lambda c: c.train.mixed_precision == "bf16" and _weak_gpu(c),
         "bf16 needs GPUs of compute capability 8.0 (Ampere) or above.", "Use mixed_precision: fp16."),
    Rule("use_flash_attention_2", lambda c: c.train.use_flash_attention_2 and not c.topology.on_gpu,
         "flash-attn runs on CUDA, and there is no GPU; sdpa would be used.",
         "Use use_flash_attention_2: false."),
    Rule("use_flash_attention_2", lambda c: c.train.use_flash_attention_2 and not installed("flash-attn"),
         "flash-attn is not installed; sdpa would be used.",
         "pip install flash-attn, or use_flash_attention_2: false."),
    Rule("use_flash_attention_2", lambda c: c.train.use_flash_attention_2 and c.train.mixed_precision is None,
         "flash-attn computes in fp16 or bf16 only.", "Set mixed_precision: bf16."),
    Rule("use_flash_attention_2", lambda c: c.train.use_flash_attention_2 and _weak_gpu(c),
         "flash-attn needs GPUs of compute capability 8.0 (Ampere) or above.",
         "Use use_flash_attention_2: false."),
    Rule("attention", lambda c: c.train.attention in ("flash_attention_2", "varlen", "flex_attention")
         and not c.topology.on_gpu, "it needs a GPU, and there is none.",
         "Use attention: auto, which takes documents here."),
    Rule("unsloth", lambda c: c.train.unsloth and c.several, "unsloth does not run on several ranks.",
         "Use unsloth: false."),
    Rule("log", lambda c: c.train.log == "wandb" and not installed("wandb"),
         "wandb is not installed.", "pip install 'phalanx[wandb]', or log: none."),
    Rule("log", lambda c: c.train.log == "tensorboard" and not installed("tensorboard"),
         "tensorboard is not installed.", "pip install 'phalanx[tensorboard]', or log: none."),
)
# fmt: on


def resolve_backend(run: Run, topology: Topology) -> Backend:
    """Chooses the backend and checks it against RULES.

    Raises:
        ConfigError: a pair that does not go together, with the reason and the nearest right one.
    """
    name, reason = _choose(run, topology)
    stage = run.launch.zero_stage
    if name == "deepspeed" and stage is None:
        stage = AUTOTRAIN_ZERO_STAGE
    case = Case(name, run.train, topology, stage, run.launch.sharding, run.launch.offload)
    for rule in RULES:
        if rule.refuses(case):
            raise ConfigError(f"{rule.key}: {rule.reason} {rule.mend}")
    if name == "deepspeed":
        suffix = "_offload" if run.launch.offload == "cpu" else ""
        return Backend(
            name,
            f"{reason}, ZeRO stage {stage}{' (as AutoTrain)' if run.launch.zero_stage is None else ''}",
            ACCELERATE_CONFIGS / f"deepspeed_zero{stage}{suffix}.yaml",
            DEEPSPEED_CONFIGS / f"zero{stage}{suffix}.json",
        )
    if name == "fsdp":
        sharding = run.launch.sharding
        variant = {"shard_grad_op": "_shard_grad_op", "hybrid_shard": "_hybrid"}.get(sharding or "", "")
        return Backend(name, reason, ACCELERATE_CONFIGS / f"fsdp{variant}.yaml")
    return Backend(name, reason, ACCELERATE_CONFIGS / ("ddp.yaml" if name == "ddp" else "single.yaml"))


def _choose(run: Run, topology: Topology) -> tuple[str, str]:
    """auto: one process -> none; the model fits on each rank -> ddp; else fsdp, or as the optimiser wants."""
    asked = run.train.distributed_backend
    if asked != "auto":
        return asked, f"asked for ({run.settings.sources['distributed_backend']})"
    if topology.num_processes == 1:
        return "none", "one process"
    size = size_of_model(run.train.model)
    sharded, more = "fsdp", ""
    if re.fullmatch(BITSANDBYTES, run.train.optimizer) and installed("deepspeed"):
        sharded, more = "deepspeed", f"; {run.train.optimizer} does not go with fsdp"
    if size is None:
        return (
            sharded,
            f"the size of {run.train.model} is not known before it is downloaded, and {sharded} holds the "
            f"largest{more}",
        )
    needed = predict_bytes_per_rank(size, run.train)
    hardware = topology.hardware
    room = min((gpu.memory for gpu in hardware.gpus), default=hardware.memory // topology.local_processes)
    figures = f"predicted {needed / 2**30:.1f} GiB a rank, {room / 2**30:.1f} GiB there"
    if needed <= MEMORY_SHARE * room:
        return "ddp", f"the model fits on each rank ({figures})"
    return sharded, f"the model does not fit on each rank ({figures}){more}"
