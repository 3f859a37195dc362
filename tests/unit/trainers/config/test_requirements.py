"""What a choice needs: each rule refuses what it names, and accepts each choice that its message suggests.

The launcher fills in a Place from NVML and the config, a rank from torch and its environment
(tests/unit/trainers/model/test_place.py). Both check the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.config import LaunchConfig
from trainers.config import requirements
from trainers.config.errors import ConfigError
from trainers.config.requirements import RULES, Place, check_requirements, choose_attention
from trainers.config.schema import TrainConfig


def place(backend: str = "none", processes: int = 1, on_gpu: bool = False, **values: Any) -> Place:
    return Place(backend=backend, processes=processes, on_gpu=on_gpu, **values)


def gpus(backend: str = "none", processes: int = 1, **values: Any) -> Place:
    """Return a place with GPUs of compute capability 8.0, if `capability` does not say otherwise."""
    return place(backend, processes, on_gpu=True, **{"capability": (8, 0), **values})


def zero(stage: int, **values: Any) -> Place:
    return gpus("deepspeed", 2, zero_stage=stage, **values)


CPU, CPU_RANKS = place(), place("ddp", 2)
AMPERE, TURING = gpus(), gpus(capability=(7, 5))
DDP, FSDP, ZERO_2, ZERO_3 = gpus("ddp", 2), gpus("fsdp", 2), zero(2), zero(3)


def settings(**values: Any) -> TrainConfig:
    return TrainConfig(**{"trainer": "sft", "quantization": None, **values})


@dataclass(frozen=True)
class Case:
    """A config and a place that a rule refuses, the words of the message, and what is accepted instead."""

    values: dict[str, Any]
    where: Place
    words: tuple[str, ...]
    accepted: tuple[tuple[dict[str, Any], Place], ...]
    without: str = ""  # a package that is not installed
    compilers: tuple[str, ...] = ("g++", "gcc")

    def __str__(self) -> str:
        named = ", ".join(f"{name}={value}" for name, value in self.values.items())
        return f"{named or self.words[0]} on {self.where.backend}{' GPUs' if self.where.on_gpu else ''}"


def optimizer(name: str, package: str) -> Case:
    return Case(
        {"optimizer": name},
        AMPERE,
        ("optimizer: it is part of ", package, "pip install ", "or use adamw_torch."),
        (({"optimizer": "adamw_torch"}, AMPERE),),
        without=package,
    )


INT8, INT4 = ({"peft": True, "quantization": name} for name in ("int8", "int4"))
ADAPTED_DPO = {"trainer": "dpo", "peft": True}
PRECOMPUTED = {**ADAPTED_DPO, "precompute_ref_log_probs": True}
CASES = [
    # The backend
    Case({}, place("none", 2), ("distributed_backend: none runs one process", "ddp, or num_processes: 1"),
         (({}, CPU_RANKS), ({}, CPU))),
    Case({"distributed_backend": "fsdp"}, DDP,
         ("distributed_backend: the ranks were started with another backend.", "accelerate_configs/", "auto"),
         (({"distributed_backend": "fsdp"}, FSDP), ({}, DDP), ({"distributed_backend": "fsdp"}, AMPERE))),
    Case({}, ZERO_2, ("distributed_backend: deepspeed is not installed", "phalanx[deepspeed]", "use fsdp"),
         (({}, FSDP),), without="deepspeed"),
    Case({}, gpus("fsdp", 2, zero_stage=2), ("launch.zero_stage: ", "deepspeed", "remove zero_stage"),
         (({}, ZERO_2), ({}, FSDP))),
    Case({}, gpus("ddp", 2, sharding="full_shard"), ("launch.sharding: ", "fsdp", "remove sharding"),
         (({}, gpus("fsdp", 2, sharding="full_shard")), ({}, DDP))),
    Case({}, gpus("fsdp", 2, sharding="hybrid_shard"), ("launch.sharding: ", "only one", "Use full_shard."),
         (({}, gpus("fsdp", 2, sharding="full_shard")),
          ({}, gpus("fsdp", 2, sharding="hybrid_shard", machines=2)))),
    Case({}, place("fsdp", 2, sharding="hybrid_shard", machines=2),
         ("launch.sharding: ", "needs GPUs", "Use full_shard."),
         (({}, place("fsdp", 2, sharding="full_shard", machines=2)),)),
    # Offload
    Case({}, gpus("ddp", 2, offload="cpu"), ("launch.offload: only fsdp and deepspeed", "offload: none."),
         (({}, gpus("fsdp", 2, offload="cpu")), ({}, zero(2, offload="cpu")), ({}, DDP))),
    Case({}, place("fsdp", 2, offload="cpu"), ("launch.offload: there is no GPU", "Use offload: none."),
         (({}, place("fsdp", 2)), ({}, place("deepspeed", 2, zero_stage=2, offload="cpu")))),
    Case({}, zero(1, offload="cpu"), ("launch.offload: ", "ZeRO-1", "Use zero_stage: 2."),
         (({}, zero(2, offload="cpu")), ({}, zero(1)))),
    # Quantization
    Case(INT4, AMPERE, ("quantization: bitsandbytes is not installed", "pip install ", "quantization: null"),
         (({"peft": True}, AMPERE),), without="bitsandbytes"),
    *(Case(INT8, where, ("quantization: int8 weights cannot be sharded.", "int4", "ddp", "zero_stage: 2"),
           ((INT4, where), (INT8, DDP), (INT8, ZERO_2))) for where in (FSDP, ZERO_3)),
    Case(INT8, CPU_RANKS, ("quantization: int8 on CPU", "Use int4, or num_processes: 1."),
         ((INT4, CPU_RANKS), (INT8, CPU))),
    Case(PRECOMPUTED, FSDP,
         ("precompute_ref_log_probs: ", "base model is the reference", "precompute_ref_log_probs: false"),
         ((ADAPTED_DPO, FSDP), (PRECOMPUTED, DDP), (PRECOMPUTED, place("fsdp", 2)),
          ({**PRECOMPUTED, "model_ref": "m"}, FSDP), ({**PRECOMPUTED, "peft": False}, FSDP))),
    # Optimisers
    *(optimizer(*pair) for pair in (
        ("adamw_8bit", "bitsandbytes"), ("paged_lion_32bit", "bitsandbytes"), ("ademamix", "bitsandbytes"),
        ("rmsprop_bnb_8bit", "bitsandbytes"), ("adamw_torch_4bit", "torchao"),
        ("schedule_free_radam", "schedulefree"), ("stable_adamw", "torch-optimi"), ("grokadamw", "grokadamw"),
        ("lomo", "lomo-optim"), ("adalomo", "lomo-optim"), ("adamw_anyprecision", "torchdistx"),
        ("adamw_torch_xla", "torch-xla"), ("adamw_torch_npu_fused", "torch-npu"),
    )),
    *(Case({"optimizer": name}, AMPERE, ("optimizer: it needs optim_target_modules", "adamw_torch, with"),
           (({"optimizer": "adamw_torch", "peft": True}, AMPERE),))
      for name in ("galore_adamw", "apollo_adamw")),
    *(Case({"optimizer": name}, FSDP, ("optimizer: ", "fsdp has sharded", "adamw_torch_fused, or another"),
           (({"optimizer": "adamw_torch_fused"}, FSDP), ({"optimizer": name}, DDP)))
      for name in ("adamw_8bit", "adafactor", "adagrad")),
    *(Case({"optimizer": name}, ZERO_2, ("optimizer: ", "DeepSpeed", "Use adamw_torch, or ", "backend: ddp."),
           (({"optimizer": "adamw_torch"}, ZERO_2), ({"optimizer": name}, DDP)))
      for name in ("adafactor", "adagrad")),
    Case({"optimizer": "paged_adamw_8bit"}, CPU, ("optimizer: a paged optimiser", "the name without paged_"),
         (({"optimizer": "adamw_8bit"}, CPU), ({"optimizer": "adamw_torch"}, CPU),
          ({"optimizer": "paged_adamw_8bit"}, AMPERE))),
    # Activation checkpointing and compilation
    Case({"activation_checkpointing": "offload"}, CPU,
         ("activation_checkpointing: there is no GPU", "Use full."),
         (({"activation_checkpointing": "full"}, CPU), ({"activation_checkpointing": "offload"}, AMPERE))),
    Case({"activation_checkpointing": "selective", "peft": True}, ZERO_3,
         ("activation_checkpointing: selective is", "trl#2514", "Use full", "zero_stage: 2", "fsdp"),
         (({"activation_checkpointing": "full", "peft": True}, ZERO_3),
          *(({"activation_checkpointing": "selective", "peft": True}, other) for other in (ZERO_2, FSDP)),
          ({"activation_checkpointing": "selective"}, ZERO_3))),
    Case({"torch_compile": True}, ZERO_3, ("torch_compile: DeepSpeed's", "false", "zero_stage: 2", "fsdp"),
         (({}, ZERO_3), ({"torch_compile": True}, ZERO_2), ({"torch_compile": True}, FSDP))),
    Case({"torch_compile": True}, CPU, ("torch_compile: there is no compiler", "g++ on a CPU", "Install one"),
         (({}, CPU),), compilers=("gcc",)),
    Case({"torch_compile": True}, AMPERE, ("torch_compile: ", "gcc or clang with a GPU", "Install one"),
         (({}, AMPERE),), compilers=("g++",)),
    # Kernels and precision
    Case({"use_kernels": True}, CPU, ("use_kernels: the hub's kernels are for GPUs", "use_kernels: false."),
         (({}, CPU), ({"use_kernels": True}, AMPERE))),
    Case({"use_kernels": True}, AMPERE, ("use_kernels: the package kernels is not", "pip install kernels"),
         (({}, AMPERE),), without="kernels"),
    Case({"mixed_precision": "fp16"}, CPU, ("mixed_precision: a CPU cannot", "Use mixed_precision: null."),
         (({}, CPU), ({"mixed_precision": "fp16"}, AMPERE))),
    Case({"mixed_precision": "bf16"}, CPU, ("mixed_precision: ", "avx512_bf16", "Use mixed_precision: null."),
         (({}, CPU), ({"mixed_precision": "bf16"}, place(cpu_bf16=True)))),
    Case({"mixed_precision": "bf16"}, TURING, ("mixed_precision: ", "8.0", "Use mixed_precision: fp16."),
         (({"mixed_precision": "fp16"}, TURING), ({"mixed_precision": "bf16"}, AMPERE))),
    # The rest
    Case({"unsloth": True}, DDP, ("unsloth: ", "several ranks", "Use unsloth: false."),
         (({}, DDP), ({"unsloth": True}, AMPERE))),
    *(Case({"log": name}, CPU, (f"log: {name} is not installed", f"phalanx[{name}]", "log: none."),
           (({"log": "none"}, CPU),), without=name) for name in ("wandb", "tensorboard")),
]  # fmt: skip

Given = Callable[[Case], None]


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`compilers("gcc")`: this is the only program on the PATH."""
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)

    def have(*names: str) -> None:
        folder = tmp_path / "-".join(names)
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(folder))

    return have


@pytest.fixture
def given(packages: Callable[..., None], compilers: Callable[..., None]) -> Given:
    """`given(case)`: this machine has all packages except one, and the compilers that the case says."""

    def have(case: Case) -> None:
        packages(without=case.without or ())
        compilers(*case.compilers)

    return have


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rule_says_what_is_wrong_and_what_is_allowed(case: Case, given: Given) -> None:
    given(case)
    with pytest.raises(ConfigError) as refusal:
        check_requirements(settings(**case.values), case.where)
    start, *words = case.words
    assert str(refusal.value).startswith(start)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_refusal_suggests_is_accepted(case: Case, given: Given) -> None:
    given(case)
    for values, where in case.accepted:
        check_requirements(settings(**values), where)


@pytest.mark.parametrize("case", [case for case in CASES if case.without], ids=str)
def test_with_its_package_the_choice_is_accepted(case: Case, packages: object) -> None:
    check_requirements(settings(**case.values), case.where)


def test_every_rule_names_a_key_and_a_fix() -> None:
    for rule in RULES:
        section, _, name = rule.key.rpartition(".")
        assert name in {"": TrainConfig, "launch": LaunchConfig}[section].model_fields
        assert rule.reason.endswith(".")
        assert rule.fix.endswith(".")


def test_each_rule_has_a_case(given: Given) -> None:
    applied = set()
    for case in CASES:
        given(case)
        config = settings(**case.values)
        applied.add(next(i for i, rule in enumerate(RULES) if rule.refuses(config, case.where)))
    assert [RULES[i].reason for i in range(len(RULES)) if i not in applied] == []


@pytest.mark.parametrize(
    ("variable", "where"), [("CXX", CPU), ("CC", AMPERE)], ids=["the-CPU-reads-CXX", "GPUs-read-CC"]
)
def test_torch_compile_takes_the_compiler_of_the_environment(
    variable: str, where: Place, compilers: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers("mycc")
    monkeypatch.setenv(variable, "mycc")
    check_requirements(settings(torch_compile=True), where)


HALF = {"mixed_precision": "bf16"}
NO_FLASH_ATTN = (
    "flash_attention_2: the package flash-attn is not installed (pip install 'phalanx[flash-attn]')"
)
NO_HALF = "flash_attention_2, varlen: it needs mixed_precision: bf16 or fp16"
OLD_GPU = "flash_attention_2, varlen: it needs GPUs of compute capability 8.0 (Ampere) or above"
MASKED = "flash_attention_2, varlen, flex_attention, documents: a masked LM is not causal"
NO_GPU = "flash_attention_2, varlen, flex_attention: there is no GPU"


@pytest.mark.parametrize(
    ("values", "where", "without", "expected"),
    [
        pytest.param({}, CPU, (), ("documents", NO_GPU), id="CPU"),
        pytest.param({"trainer": "mlm"}, AMPERE, (), ("sdpa", MASKED), id="masked-LM"),
        pytest.param(HALF, AMPERE, (), ("flash_attention_2", "the fastest for packed documents"), id="8.0"),
        pytest.param(HALF, AMPERE, "flash-attn", ("varlen", NO_FLASH_ATTN), id="8.0-without-flash-attn"),
        pytest.param({}, AMPERE, (), ("flex_attention", NO_HALF), id="8.0-in-float32"),
        pytest.param({"mixed_precision": "fp16"}, TURING, (), ("flex_attention", OLD_GPU), id="7.5"),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest_attention_of_the_place_and_says_why(
    packages: Callable[..., None],
    values: dict[str, Any],
    where: Place,
    without: str,
    expected: tuple[str, str],
) -> None:
    packages(without)
    assert choose_attention(settings(**values), where) == expected


@pytest.mark.parametrize(
    ("values", "where", "without", "message"),
    [
        ({"attention": "varlen"}, CPU, (),
         "attention: varlen cannot be used: there is no GPU. Set attention: auto, which selects documents"),
        ({"attention": "flex_attention"}, CPU, (), "attention: flex_attention cannot be used: there is no"),
        ({"attention": "documents", "trainer": "mlm"}, AMPERE, (),
         "attention: documents cannot be used: a masked LM is not causal. Set attention: auto, which selects "
         "sdpa here."),
        ({"attention": "varlen"}, AMPERE, (),
         "attention: varlen cannot be used: it needs mixed_precision: bf16 or fp16. Set attention: auto"),
        ({"attention": "varlen", "mixed_precision": "fp16"}, TURING, (),
         "attention: varlen cannot be used: it needs GPUs of compute capability 8.0 (Ampere) or above. Set "
         "attention: auto, which selects flex_attention here."),
        ({"attention": "flash_attention_2", **HALF}, AMPERE, "flash-attn",
         "attention: flash_attention_2 cannot be used: the package flash-attn is not installed"),
        ({"use_flash_attention_2": True, **HALF}, AMPERE, "flash-attn",
         "use_flash_attention_2: flash_attention_2 cannot be used: the package flash-attn is not installed "
         "(pip install 'phalanx[flash-attn]'). Set use_flash_attention_2: false, which selects varlen here."),
    ],
)  # fmt: skip
def test_an_attention_that_the_place_does_not_have_is_refused(
    packages: Callable[..., None], values: dict[str, Any], where: Place, without: str, message: str
) -> None:
    packages(without)
    with pytest.raises(ConfigError) as refusal:
        check_requirements(settings(**values), where)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "values", "where"),
    [
        ("flash_attention_2", HALF, AMPERE),
        ("varlen", {"mixed_precision": "fp16"}, AMPERE),
        ("flex_attention", {}, TURING),
        ("documents", {}, CPU),
        ("sdpa", {}, CPU),
        ("eager", {"trainer": "mlm"}, CPU),
    ],
)
def test_an_attention_that_the_place_has_is_taken(
    packages: object, name: str, values: dict[str, Any], where: Place
) -> None:
    assert choose_attention(settings(attention=name, **values), where) == (name, "attention")


def test_an_attention_that_does_not_work_with_the_model_is_passed_over(packages: object) -> None:
    def unfit(name: str) -> str | None:
        return "gemma2 caps its attention scores" if name.startswith(("flash", "varlen")) else None

    config = settings(**HALF)
    expected = ("flex_attention", "flash_attention_2, varlen: gemma2 caps its attention scores")
    assert choose_attention(config, AMPERE, unfit) == expected
    with pytest.raises(ConfigError, match=r"varlen cannot be used: gemma2 caps .* selects flex_attention"):
        choose_attention(settings(attention="varlen", **HALF), AMPERE, unfit)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512_bf16", True), ("fpu amx_bf16", True), ("fpu avx512f", False), (None, False)],
)
def test_whether_the_cpu_computes_bf16_is_read_from_its_flags(
    flags: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor: 0\nflags: {flags}\n")
    monkeypatch.setattr(requirements, "Path", lambda path: file)
    assert requirements.cpu_computes_bf16() is expected
