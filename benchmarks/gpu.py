"""Measure speed, MFU and memory on a GPU: phalanx with each attention and checkpointing, and TRL.

    python benchmarks/gpu.py --sizes 0.1B 1B 8B

Random Llama-shaped models, bf16 over float32 weights, packs of 4,096 tokens, documents of log-normal lengths.
If 16 bytes a parameter do not fit, the model is bf16 and an adapter is trained (LoRA, r 16, all linear
layers). Each cell runs in its own process. The cells take turns, and the first steps are not timed. A cell
that fails says why.

MFU = tokens/s x flops a token / the peak of the GPUs. The flops are those that the job needs, without what
checkpointing computes again. They are counted as PaLM does (arXiv 2204.02311, appendix B), but with half of
the attention, since a token sees only the tokens before it.

    full training   6 N + 12 L h a / 2
    LoRA            4 N + 6 A + 12 L h a / 2      frozen weights have no gradient

N: parameters without the embedding, with the head. A: parameters of the adapter. L: layers. h: hidden size.
a: mean length of the document that a token is in (PaLM uses the full sequence).
Peak: dense bf16 from the maker's data sheet (PEAKS). For a device that is not listed, no MFU is printed.

Without a GPU the script says so and ends. The models need up to 17 GB of disk, one at a time (TMPDIR).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from measure import (
    BENCHMARKS,
    GIB,
    OPTIMIZER,
    Failed,
    Observed,
    alternate,
    log_normal_lengths,
    observe,
    provenance,
    run,
    spread,
    table,
    write_rows,
)

from launcher.plan.topology import Gpu, detect_hardware

# Words in the device's name -> dense bf16 TFLOPS. The first match counts.
PEAKS = {
    ("H100", "PCIe"): 756.0,
    ("H100", "NVL"): 835.0,
    ("H100",): 989.0,
    ("H200",): 989.0,
    ("GH200",): 989.0,
    ("A100",): 312.0,
    ("L40S",): 362.0,
    ("L4",): 121.0,
}
ATTENTIONS = ("flash_attention_2", "varlen", "flex_attention", "sdpa")
CHECKPOINTINGS = ("none", "full", "selective", "offload")
RANK = 16  # of LoRA
TOKENS = 1000  # number of different tokens in the rows
TRAINED_BYTES, FROZEN_BYTES = 16, 2  # a parameter: float32 weight, gradient, two moments; bf16 weight
ROOM = 0.8  # largest share of the memory for weights, gradients and optimiser state


@dataclass(frozen=True)
class Shape:
    """A Llama model: its sizes, and the number of packs in a micro-batch."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    packs: int

    @property
    def linear(self) -> list[tuple[int, int]]:
        """The inputs and outputs of the linear modules of one layer."""
        kv = self.hidden // self.heads * self.kv_heads
        projections = [(self.hidden, self.hidden), (self.hidden, kv), (self.hidden, kv)]
        projections.append((self.hidden, self.hidden))
        wide = (self.hidden, self.intermediate)
        return [*projections, wide, wide, (self.intermediate, self.hidden)]

    @property
    def counted(self) -> int:
        """N: the parameters without the embedding."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * sum(i * o for i, o in self.linear) + norms + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.counted + self.vocabulary * self.hidden

    @property
    def adapter(self) -> int:
        """A: the parameters of LoRA on every linear layer except the head."""
        return self.layers * RANK * sum(i + o for i, o in self.linear)

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=32768, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip


SHAPES = {
    "0.1B": Shape(12, 768, 12, 12, 2048, 32000, packs=8),
    "1B": Shape(16, 2048, 32, 8, 8192, 32000, packs=2),
    "8B": Shape(32, 4096, 32, 8, 14336, 128256, packs=1),
}


def flops_per_token(shape: Shape, attended: float, lora: bool) -> float:
    """Return the flops of one token's forward and backward (see the docstring of this file)."""
    weights = 4 * shape.counted + 6 * shape.adapter if lora else 6 * shape.counted
    return weights + 12 * shape.layers * shape.hidden * attended / 2


def attended(lengths: Sequence[int]) -> float:
    """Return the mean, over tokens, of the length of their document."""
    return sum(length**2 for length in lengths) / sum(lengths)


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 flops a second of a device, or None if it is not listed."""
    words = set(re.split(r"[\s_-]+", name))
    return next((peak * 1e12 for key, peak in PEAKS.items() if words.issuperset(key)), None)


def needs_lora(shape: Shape, memory: int) -> bool:
    """Return whether full training does not fit into the memory of a GPU.

    Raises:
        ValueError: the frozen weights do not fit either.
    """
    if shape.parameters * FROZEN_BYTES > ROOM * memory:
        raise ValueError(f"{shape.parameters * FROZEN_BYTES / GIB:.0f} GiB of weights do not fit")
    return shape.parameters * TRAINED_BYTES > ROOM * memory


def make_model(shape: Shape, folder: Path) -> None:
    """Write random weights in bf16, and a tokenizer of the words 0, 1, 2, ... that the rows do not need."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(shape.config()).to(torch.bfloat16).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(TOKENS - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_rows(path: Path, lengths: Sequence[int]) -> None:
    """Write tokenized rows, so that every side has the same tokens."""
    import numpy as np

    random = np.random.default_rng(0)
    drawn = (random.integers(4, TOKENS, length).tolist() for length in lengths)
    write_rows(path, ({"input_ids": ids, "labels": ids} for ids in drawn))


@dataclass(frozen=True)
class Job:
    """What all sides train."""

    options: Namespace
    shape: Shape
    lora: bool
    folder: Path  # has model/ and rows.jsonl
    mean: float  # mean tokens of a document


def phalanx(job: Job, attention: str, checkpointing: str, out: Path) -> list[str]:
    params = {
        "attention": attention,
        "activation_checkpointing": checkpointing,
        "mixed_precision": "bf16",
        "packing": "bfd",
        "block_size": job.options.length,
        "model_max_length": job.options.length,
        "batch_size": job.shape.packs,
        "gradient_accumulation": 1,
        "max_steps": job.options.steps,
        "lr": 1e-5,
        "optimizer": OPTIMIZER,
        "warmup_ratio": 0.0,
        "peft": job.lora,
        "lora_r": RANK,
        "lora_dropout": 0.0,
        "quantization": None,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    config = {
        "task": "llm-sft",
        "base_model": str(job.folder / "model"),
        "project_name": str(out),
        "data": {"path": str(job.folder / "rows.jsonl"), "train_split": "train", "chat_template": None},
        "params": params,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return ["trainers.sft", str(path)]


def trl(job: Job, packed: bool, attention: str | None, out: Path) -> list[str]:
    """Return TRL's command, with its defaults. A padded micro-batch has as many tokens as the packs have."""
    options, rows = job.options, max(1, round(job.shape.packs * job.options.length / job.mean))
    argv = [str(BENCHMARKS / "bare_sft.py"), str(job.folder / "model"), str(job.folder / "rows.jsonl")]
    argv += [
        str(out),
        "--bf16",
        "--length",
        str(options.length),
        "--steps",
        str(options.steps),
        "--lr",
        "1e-5",
    ]
    argv += ["--packing", "--batch", str(job.shape.packs)] if packed else ["--batch", str(rows)]
    argv += ["--attention", attention] if attention else []
    return [*argv, "--lora"] if job.lora else argv


def sides(job: Job) -> dict[str, Callable[[Path], list[str]]]:
    """Return name of a cell -> the function that makes its command. A cell that cannot run fails with why."""
    cells: dict[str, Callable[[Path], list[str]]] = {}
    for attention, checkpointing in itertools.product(job.options.attention, job.options.checkpointing):
        cells[f"phalanx, {attention}, {checkpointing}"] = partial(phalanx, job, attention, checkpointing)
    if not job.options.no_trl:
        cells["trl padded, its defaults"] = partial(trl, job, False, None)
        cells["trl packed, its defaults"] = partial(trl, job, True, None)
        if importlib.util.find_spec("flash_attn"):
            cells["trl packed, flash_attention_2"] = partial(trl, job, True, "flash_attention_2")
    return cells


def measured(job: Job, command: Callable[[Path], list[str]], repeat: int) -> list[Observed]:
    out = Path(tempfile.mkdtemp(dir=job.folder)) / "out"
    caches = {name: str(job.folder / name) for name in ("HF_DATASETS_CACHE", "PHALANX_CACHE")}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(job.options.ranks)))
    shown = ",".join(visible.split(",")[: job.options.ranks])
    environ = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": shown, **caches}
    return observe(command(out), job.folder, job.options.ranks, **environ)


def report(
    results: dict[str, list[list[Observed]]],
    failed: dict[str, Failed],
    dropped: int,
    flops: float,
    peak: float | None,
) -> str:
    """Return the table, with a row for each cell. `peak` is that of all its GPUs together."""
    head = ["what", "tokens/s", "MFU", "s a step", "peak GPU memory", "first loss"]
    rows = []
    for name, runs in results.items():
        speeds = [seen[0].tokens_per_second(dropped) for seen in runs]
        used = [100 * speed * flops / peak for speed in speeds] if peak else []
        memory = [max(rank.gpu_memory or 0 for rank in seen) / GIB for seen in runs]
        rows.append([
            name,
            spread(speeds),
            f"{spread(used, '.1f')} %" if used else "",
            spread([seen[0].seconds_per_step(dropped) for seen in runs], ".3f"),
            f"{spread(memory, '.1f')} GiB",
            f"{runs[-1][0].losses[0]:.3f}",
        ])  # fmt: skip
    rows += [[name, f"not measured: {reason.reason}", *[""] * 4] for name, reason in failed.items()]
    return table(head, rows)


def describe(job: Job, gpu: Gpu, lengths: Sequence[int], flops: float, peak: float | None) -> str:
    """Return a description of what a table measures."""
    options, shape = job.options, job.shape
    how = f"LoRA (r {RANK}) over frozen bf16 weights" if job.lora else "full training, float32 weights"
    given = (
        f"of {peak / 1e12:.0f} TFLOPS a GPU" if peak else f"not given: the peak of {gpu.name} is not known"
    )
    return (
        f"{shape.parameters / 1e9:.2f} billion parameters, {how}, {options.ranks} GPU(s). Packs of "
        f"{options.length} tokens, {shape.packs} in a micro-batch; documents of {job.mean:.0f} tokens on "
        f"average (a = {attended(lengths):.0f}). {flops / 1e9:.3f} GFLOP a token; MFU {given}. The first "
        f"{options.dropped} of {options.steps} steps are not timed."
    )


def benchmark(size: str, options: Namespace, gpu: Gpu) -> str:
    """Make one model, measure every cell, and return the description and the table."""
    shape = SHAPES[size]
    try:
        lora = options.lora or needs_lora(shape, gpu.memory)
    except ValueError as error:
        return f"Not measured: {error} into {gpu.memory / GIB:.0f} GiB."
    # A padded micro-batch may have more tokens than the packs, so make rows for twice the steps.
    tokens = 2 * options.ranks * options.steps * shape.packs * options.length
    mean = min(options.mean, options.length)
    lengths = log_normal_lengths(int(tokens / mean), mean, options.length, seed=0).tolist()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(options, shape, lora, Path(folder), sum(lengths) / len(lengths))
        make = [sys.executable, str(Path(__file__).resolve()), "--make", size, str(job.folder / "model")]
        run(make, job.folder)
        make_rows(job.folder / "rows.jsonl", lengths)
        kinds = {name: partial(measured, job, command) for name, command in sides(job).items()}
        results, failed = alternate(
            kinds, options.repeats, lambda seen: f"{seen[0].tokens_per_second(options.dropped):.0f} tokens/s"
        )
    peak = options.peak * 1e12 if options.peak else peak_flops(gpu.name)
    flops = flops_per_token(shape, attended(lengths), lora)
    cells = report(results, failed, options.dropped, flops, peak and peak * options.ranks)
    return f"{describe(job, gpu, lengths, flops, peak)}\n\n{cells}"


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--attention", nargs="+", choices=("auto", "documents", *ATTENTIONS), default=list(ATTENTIONS)
    )
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTINGS, default=list(CHECKPOINTINGS))
    parser.add_argument("--no-trl", action="store_true", help="measure only phalanx")
    parser.add_argument("--lora", action="store_true", help="train adapters, even if full training fits")
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens of a pack and of the longest document"
    )
    parser.add_argument("--mean", type=float, default=500, help="mean tokens of a document")
    parser.add_argument("--ranks", type=int, default=1, help="number of GPUs")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--dropped", type=int, default=5, help="steps at the start that are not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOPS of a GPU that is not listed")
    parser.add_argument("--make", nargs=2, metavar=("SIZE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not 1 <= options.dropped < options.steps:
        parser.error("--dropped must be at least 1 and less than --steps")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.make:
        make_model(SHAPES[options.make[0]], Path(options.make[1]))
        return 0
    gpus = detect_hardware().gpus
    if not gpus:
        print("no GPU found: nothing was measured")
        return 0
    if len(gpus) < options.ranks:
        raise SystemExit(f"error: --ranks {options.ranks}: there are {len(gpus)} GPUs")
    print(provenance("torch", "transformers", "trl", "accelerate"), flush=True)
    for size in options.sizes:
        print(f"\n## {size}\n\n{benchmark(size, options, gpus[0])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
