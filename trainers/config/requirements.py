"""What each choice in the config needs: a GPU, a package, a backend, another choice. One table.

The launcher checks the table before a rank starts, with what NVML reports about the machine. A rank checks it
again with what torch reports, so that ranks which a user starts without the launcher refuse the same configs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path

from trainers.config import packages
from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig

AMPERE = (8, 0)  # compute capability

# Optimisers that are not in torch or transformers: (their names, the package, the argument of pip install).
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


@dataclass(frozen=True, kw_only=True)
class Place:
    """The hardware of a run, and how the run is distributed over it."""

    backend: str  # ddp, fsdp, deepspeed or none
    processes: int
    on_gpu: bool
    capability: tuple[int, int] = AMPERE  # the lowest of all GPUs
    cpu_bf16: bool = False  # whether the CPU has instructions for bf16
    zero_stage: int | None = None
    # From the section `launch`; ranks that a user starts without the launcher do not know these values.
    machines: int = 1
    sharding: str | None = None
    offload: str = "none"

    @property
    def several(self) -> bool:
        return self.processes > 1


@dataclass(frozen=True)
class Rule:
    """A combination that does not work: the key to change, the reason, and the nearest valid choice."""

    key: str
    refuses: Callable[[TrainConfig, Place], bool]
    reason: str
    fix: str


def check_requirements(config: TrainConfig, place: Place) -> None:
    """Check a config against RULES and the attention table.

    Raises:
        ConfigError: a combination that does not work, with the reason and the nearest valid choice.
    """
    for rule in RULES:
        if rule.refuses(config, place):
            raise ConfigError(f"{rule.key}: {rule.reason} {rule.fix}")
    choose_attention(config, place)


def reentrancy(zero3: bool, peft: bool) -> tuple[bool, str]:
    """Return whether activation checkpointing is reentrant for a run, and why."""
    if zero3 and peft:
        # The recomputation finds parameters that DeepSpeed has partitioned again, so their shapes differ from
        # those in the forward.
        return True, "ZeRO-3 with an adapter needs reentrant checkpointing (trl#2514)"
    # With reentrant checkpointing an adapter's parameter is ready twice in a backward, which DDP refuses.
    return False, "torch recommends it, and DDP with an adapter needs it"


@dataclass(frozen=True)
class Need:
    """A condition of an attention, and the reason why it cannot be used without it."""

    met: Callable[[TrainConfig, Place], bool]
    without: str


CAUSAL = Need(lambda c, p: c.kind.causal, "a masked LM is not causal")
GPU = Need(lambda c, p: p.on_gpu, "there is no GPU")
HALF = Need(lambda c, p: c.mixed_precision is not None, "it needs mixed_precision: bf16 or fp16")
NEW_GPU = Need(
    lambda c, p: p.capability >= AMPERE, "it needs GPUs of compute capability 8.0 (Ampere) or above"
)
FLASH_ATTN = Need(
    lambda c, p: packages.installed("flash-attn"),
    "the package flash-attn is not installed (pip install 'phalanx[flash-attn]')",
)
# The fastest first; each keeps packed documents separate (docs/packing.md). sdpa and eager need nothing.
ATTENTIONS: dict[str, tuple[Need, ...]] = {
    "flash_attention_2": (CAUSAL, GPU, HALF, NEW_GPU, FLASH_ATTN),
    "varlen": (CAUSAL, GPU, HALF, NEW_GPU),
    "flex_attention": (CAUSAL, GPU),
    "documents": (CAUSAL,),
}


def choose_attention(
    config: TrainConfig, place: Place, unfit: Callable[[str], str | None] = lambda name: None
) -> tuple[str, str]:
    """Return the attention of a run, and why it is chosen.

    `unfit` returns why an attention does not work with the model, or None. Only a rank knows this.

    Raises:
        ConfigError: the attention in the config cannot be used; the message has the reason and another one.
    """
    refused: dict[str, str | None] = {}
    for name, needs in ATTENTIONS.items():
        unmet = (need.without for need in needs if not need.met(config, place))
        refused[name] = unfit(name) or next(unmet, None)
    best = next((name for name, why in refused.items() if why is None), "sdpa")
    key = "use_flash_attention_2" if config.use_flash_attention_2 else "attention"
    asked = "flash_attention_2" if config.use_flash_attention_2 else config.attention
    if asked == "auto":
        passed = takewhile(lambda name: name != best, refused)
        reasons = [
            f"{', '.join(names)}: {why}" for why, names in groupby(passed, key=lambda name: refused[name])
        ]
        return best, "; ".join(reasons) or "the fastest for packed documents"
    if why := refused.get(asked):
        off = "false" if config.use_flash_attention_2 else "auto"
        raise ConfigError(
            f"{key}: {asked} cannot be used: {why}. Set {key}: {off}, which selects {best} here."
        )
    return asked, key


def cpu_computes_bf16() -> bool:
    """Return whether this machine's CPU has instructions for bf16 (avx512_bf16 or amx_bf16)."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _optimizer(names: str, without: str = "") -> Callable[[TrainConfig, Place], bool]:
    """Return a check: the optimiser has one of these names, and the package `without` is not installed."""
    return lambda c, p: (
        bool(re.fullmatch(names, c.optimizer)) and not (without and packages.installed(without))
    )


def _no_compiler(config: TrainConfig, place: Place) -> bool:
    """Return whether no compiler is installed: inductor writes C++ for a CPU, Triton C around its kernels."""
    found = ("cc", "gcc", "clang", os.environ.get("CC")) if place.on_gpu else (os.environ.get("CXX", "g++"),)
    return not any(name and shutil.which(name) for name in found)


# fmt: off
RULES = (
    Rule("distributed_backend", lambda c, p: p.backend == "none" and p.several,
         "none runs one process, but num_processes is higher.", "Use ddp, or num_processes: 1."),
    Rule("distributed_backend", lambda c, p: p.several and c.distributed_backend not in ("auto", p.backend),
         "the ranks were started with another backend.",
         "Start them with the file of accelerate_configs/ that it names, or use auto."),
    Rule("distributed_backend", lambda c, p: p.backend == "deepspeed" and not packages.installed("deepspeed"),
         "deepspeed is not installed.", "pip install 'phalanx[deepspeed]', or use fsdp."),
    Rule("launch.zero_stage", lambda c, p: p.zero_stage is not None and p.backend != "deepspeed",
         "ZeRO stages belong to distributed_backend: deepspeed.", "Set that, or remove zero_stage."),
    Rule("launch.sharding", lambda c, p: p.sharding is not None and p.backend != "fsdp",
         "sharding belongs to distributed_backend: fsdp.", "Set that, or remove sharding."),
    Rule("launch.sharding", lambda c, p: p.sharding == "hybrid_shard" and p.machines < 2,
         "hybrid_shard replicates across machines, but there is only one.", "Use full_shard."),
    Rule("launch.sharding", lambda c, p: p.sharding == "hybrid_shard" and not p.on_gpu,
         "accelerate's device mesh needs GPUs, but there is none.", "Use full_shard."),
    Rule("launch.offload", lambda c, p: p.offload == "cpu" and p.backend not in ("fsdp", "deepspeed"),
         "only fsdp and deepspeed can offload.", "Use distributed_backend: fsdp, or offload: none."),
    Rule("launch.offload", lambda c, p: p.offload == "cpu" and p.backend == "fsdp" and not p.on_gpu,
         "there is no GPU, so the parameters are in host memory already.", "Use offload: none."),
    Rule("launch.offload", lambda c, p: p.offload == "cpu" and p.zero_stage == 1,
         "there is no template for ZeRO-1 with offload.", "Use zero_stage: 2."),
    Rule("quantization", lambda c, p: c.quantization is not None and not packages.installed("bitsandbytes"),
         "bitsandbytes is not installed.", "pip install 'phalanx[quantization]', or quantization: null."),
    Rule("quantization", lambda c, p: c.quantization == "int8"
         and (p.backend == "fsdp" or p.zero_stage == 3),
         "int8 weights cannot be sharded.", "Use int4, distributed_backend: ddp, or launch.zero_stage: 2."),
    Rule("quantization", lambda c, p: c.quantization == "int8" and p.several and not p.on_gpu,
         "int8 on CPU runs in one process only.", "Use int4, or num_processes: 1."),
    Rule("precompute_ref_log_probs", lambda c, p: c.precompute_ref_log_probs and p.backend == "fsdp"
         and c.peft and c.model_ref is None and p.on_gpu,
         "with an adapter the base model is the reference, and under fsdp it is not on the GPU yet.",
         "Use precompute_ref_log_probs: false; it costs no memory."),
    *(Rule("optimizer", _optimizer(names, without=package),
           f"it is part of {package}, which is not installed.", f"pip install {pip}, or use adamw_torch.")
      for names, package, pip in OPTIMIZER_PACKAGES),
    Rule("optimizer", _optimizer(r"(galore|apollo)_\w+"),
         "it needs optim_target_modules, which no field here sets.", "Use adamw_torch, with peft: true."),
    Rule("optimizer", lambda c, p: p.backend == "fsdp"
         and _optimizer(f"{BITSANDBYTES}|adafactor|adagrad")(c, p),
         "it cannot update weights that fsdp has sharded.",
         "Use adamw_torch_fused, or another distributed_backend."),
    Rule("optimizer", lambda c, p: p.backend == "deepspeed" and c.optimizer == "adafactor",
         "DeepSpeed flattens the weights into one vector, but Adafactor needs their rows and columns: it "
         "would train differently than on one process.", "Use adamw_torch, or distributed_backend: ddp."),
    Rule("optimizer", lambda c, p: p.backend == "deepspeed" and c.optimizer == "adagrad",
         "it creates its state before DeepSpeed partitions the weights, and fails.",
         "Use adamw_torch, or distributed_backend: ddp."),
    Rule("optimizer", lambda c, p: c.optimizer.startswith("paged_") and not p.on_gpu,
         "a paged optimiser moves its state out of a full GPU, but there is no GPU.",
         "Use adamw_torch, or the name without paged_."),
    Rule("activation_checkpointing", lambda c, p: c.activation_checkpointing == "offload"
         and not p.on_gpu,
         "there is no GPU, so activations are in host memory already.", "Use full."),
    Rule("activation_checkpointing", lambda c, p: c.activation_checkpointing == "selective"
         and reentrancy(p.zero_stage == 3, c.peft)[0],
         f"selective is not reentrant, and {reentrancy(True, True)[1]}.",
         "Use full, launch.zero_stage: 2, or distributed_backend: fsdp."),
    Rule("torch_compile", lambda c, p: c.torch_compile and p.zero_stage == 3,
         "DeepSpeed's hooks cut each layer into pieces, which torch compiles again for every layer, up to "
         "its limit.", "Use torch_compile: false, launch.zero_stage: 2, or distributed_backend: fsdp."),
    Rule("torch_compile", lambda c, p: c.torch_compile and _no_compiler(c, p),
         "there is no compiler: it needs g++ on a CPU, and gcc or clang with a GPU.",
         "Install one, or use torch_compile: false."),
    Rule("use_kernels", lambda c, p: c.use_kernels and not p.on_gpu,
         "the hub's kernels are for GPUs, but there is none.", "Use use_kernels: false."),
    Rule("use_kernels", lambda c, p: c.use_kernels and not packages.installed("kernels"),
         "the package kernels is not installed.", "pip install kernels, or use_kernels: false."),
    Rule("mixed_precision", lambda c, p: c.mixed_precision == "fp16" and not p.on_gpu,
         "a CPU cannot train with fp16.", "Use mixed_precision: null."),
    Rule("mixed_precision", lambda c, p: c.mixed_precision == "bf16" and not p.on_gpu
         and not p.cpu_bf16,
         "this CPU has no bf16 instructions (avx512_bf16 or amx_bf16).", "Use mixed_precision: null."),
    Rule("mixed_precision", lambda c, p: c.mixed_precision == "bf16" and p.capability < AMPERE,
         "bf16 needs GPUs of compute capability 8.0 (Ampere) or above.", "Use mixed_precision: fp16."),
    Rule("unsloth", lambda c, p: c.unsloth and p.several, "unsloth does not run on several ranks.",
         "Use unsloth: false."),
    Rule("log", lambda c, p: c.log == "wandb" and not packages.installed("wandb"),
         "wandb is not installed.", "pip install 'phalanx[wandb]', or log: none."),
    Rule("log", lambda c, p: c.log == "tensorboard" and not packages.installed("tensorboard"),
         "tensorboard is not installed.", "pip install 'phalanx[tensorboard]', or log: none."),
)
# fmt: on
