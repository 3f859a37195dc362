"""Compare training speed and memory with a bare TRL script: real tokens a second on the same rows.

    python examples/get_model.py .demo/SmolLM2-135M-Instruct
    python benchmarks/throughput.py --data instructions.jsonl --trainer sft --length 2048 --ranks 1

Every side runs under `accelerate launch` with the same ranks, threads, model, rows, learning rate, optimiser,
float32 and activation checkpointing. The sides take turns, each time in new processes. A step is one pass
over the same documents, about `ranks x length` tokens: all sides see the same global batch, and their losses
must agree. Each repeat draws other documents. The times exclude start-up and the first step.

    trl padded         TRL's default: rows padded to the longest of their batch
    trl packed         SFTConfig(packing=True), best-fit-decreasing; attention as transformers chooses it here
    trl padding-free   DPOConfig(padding_free=True), where TRL has it
    phalanx            accelerate launch -m trainers.X config.yaml

--data: JSONL rows of instruction, input and output; for dpo and reward also chosen and rejected.
orpo and kto are not measured: they compute another loss than TRL on purpose (docs/trainers.md).
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from measure import (
    BENCHMARKS,
    MODEL,
    OPTIMIZER,
    Failed,
    Observed,
    alternate,
    need_model,
    need_rows,
    observe,
    provenance,
    question,
    run,
    spread,
    table,
    write_rows,
)

FILL = 0.97  # share of ranks x length to fill: documents of any length then fit without another pack
EQUAL = 1e-3  # largest allowed difference of the losses in one step
KINDS = {
    "sft": ("trl padded", "trl packed", "phalanx"),
    "dpo": ("trl padded", "trl padding-free", "phalanx"),
    "reward": ("trl padded", "phalanx"),
}
Row = dict[str, str]


@dataclass(frozen=True)
class Batch:
    """The rows of one step in a file, and their expected number of tokens."""

    path: Path
    rows: int
    tokens: int


def documents(data: Sequence[dict[str, Any]], trainer: str, joined: int) -> list[Row]:
    """Return rows of prompt and completion (or chosen and rejected).

    `joined` rows of the file make one longer document: all but the last are examples in its prompt.
    """
    answers = {"completion": "output"} if trainer == "sft" else {"chosen": "chosen", "rejected": "rejected"}
    out = []
    for begin in range(0, len(data) - joined + 1, joined):
        *examples, last = data[begin : begin + joined]
        before = "".join(f"{question(row)}{row['output'].strip()}\n\n" for row in examples)
        row = {"prompt": before + question(last)}
        row |= {name: last[column].strip() for name, column in answers.items()}
        if all(row.values()) and row.get("chosen") != row.get("rejected", ""):
            out.append(row)
    return out


def count_tokens(rows: Sequence[Row], model: Path) -> list[int]:
    """Return the tokens of each row in training: every answer has its prompt before it and EOS after it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def lengths(name: str) -> list[int]:
        return [len(encoding) for encoding in tokenizer.encode_batch([row[name] for row in rows])]

    answers = [name for name in rows[0] if name != "prompt"]
    parts = zip(lengths("prompt"), *map(lengths, answers), strict=True)
    return [sum(prompt + answer + 1 for answer in rest) for prompt, *rest in parts]


def packs_needed(lengths: Sequence[int], capacity: int) -> int:
    """Return the number of packs that best-fit-decreasing makes."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - length)
    return len(rooms)


def draw(lengths: Sequence[int], ranks: int, capacity: int, batch: int, seed: int) -> list[int]:
    """Draw the rows of a step at random, and return their numbers: one pack for each rank, and full padded
    micro-batches of `batch` rows (fewer, if a pack has fewer).

    Raises:
        ValueError: less than one row for each rank fits.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    left = int(FILL * ranks * capacity)
    for number in itertools.cycle(order):
        if lengths[number] > left:
            break
        chosen.append(number)
        left -= lengths[number]
    while chosen and packs_needed([lengths[number] for number in chosen], capacity) > ranks:
        chosen.pop()
    if len(chosen) < ranks:
        raise ValueError(f"fewer than {ranks} rows fit into {ranks} x {capacity} tokens")
    return chosen[: len(chosen) - len(chosen) % (ranks * min(batch, len(chosen) // ranks))]


def micro_batches(options: Namespace, rows: int) -> tuple[int, int]:
    """Return the rows of a padded micro-batch, and the micro-batches of a rank."""
    batch = min(options.batch, rows // options.ranks)
    return batch, rows // (options.ranks * batch)


def peer(options: Namespace, kind: str, model: Path, batch: Batch, out: Path) -> list[str]:
    """Return the command of a TRL script."""
    script = ["bare_sft.py"] if options.trainer == "sft" else ["bare_preference.py", options.trainer]
    argv = [str(BENCHMARKS / script[0]), *script[1:], str(model), str(batch.path), str(out)]
    size, accumulation = (1, 1) if kind == "trl packed" else micro_batches(options, batch.rows)
    argv += ["--length", str(options.length), "--lr", str(options.lr), "--steps", str(options.steps)]
    argv += ["--batch", str(size), "--accumulation", str(accumulation)]
    argv += {"trl packed": ["--packing"], "trl padding-free": ["--padding-free"]}.get(kind, [])
    return [*argv, "--no-checkpointing"] if options.checkpointing == "none" else argv


def phalanx_config(options: Namespace, model: Path, batch: Batch, out: Path) -> dict[str, Any]:
    """Return the config of the same job for phalanx."""
    size, accumulation = (1, 1) if options.trainer == "sft" else micro_batches(options, batch.rows)
    columns = {"prompt_text_column": "prompt"}
    if options.trainer == "sft":
        columns["text_column"] = "completion"
    else:
        columns |= {"text_column": "chosen", "rejected_text_column": "rejected"}
    params = {
        "lr": options.lr,
        "optimizer": OPTIMIZER,
        "warmup_ratio": 0.0,
        "max_steps": options.steps,
        "batch_size": size,
        "gradient_accumulation": accumulation,
        "block_size": options.length,
        "model_max_length": options.length,
        "peft": False,
        "quantization": None,
        "gradient_checkpointing": options.checkpointing == "full",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    params |= {"max_prompt_length": options.length} if options.trainer == "dpo" else {}
    params |= {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    return {
        "task": f"llm-{options.trainer}",
        "base_model": str(model),
        "project_name": str(out),
        "data": {
            "path": str(batch.path),
            "train_split": "train",
            "chat_template": None,
            "column_mapping": columns,
        },
        "params": params,
    }


class Sides:
    """Runs a side of the comparison on the rows of a repeat."""

    def __init__(self, options: Namespace, model: Path, work: Path) -> None:
        self.options, self.model, self.work = options, model, work
        rows = need_rows(options.data)
        self.rows = documents(rows, options.trainer, options.join)
        self.lengths = count_tokens(self.rows, model)
        self.names: Iterator[int] = itertools.count()

    def batch(self, repeat: int) -> Batch:
        options = self.options
        try:
            chosen = draw(self.lengths, options.ranks, options.length, options.batch, seed=repeat)
        except ValueError as error:
            raise SystemExit(f"error: {error}. Raise --length, or lower --join.") from None
        path = write_rows(self.work / f"rows-{repeat}.jsonl", [self.rows[number] for number in chosen])
        return Batch(path, len(chosen), sum(self.lengths[number] for number in chosen))

    def run(self, kind: str, repeat: int) -> list[Observed]:
        batch, out = self.batch(repeat), self.work / f"out-{next(self.names)}"
        if kind == "phalanx":
            config = out.with_suffix(".yaml")
            config.write_text(yaml.safe_dump(phalanx_config(self.options, self.model, batch, out)))
            target = [f"trainers.{self.options.trainer}", str(config)]
        else:
            target = peer(self.options, kind, self.model, batch, out)
        caches = {name: str(self.work / name) for name in ("HF_DATASETS_CACHE", "PHALANX_CACHE")}
        seen = observe(target, self.work, self.options.ranks, HF_HUB_OFFLINE="1", **caches)
        if seen[0].tokens[0] != batch.tokens:
            raise Failed(f"error: the first step had {seen[0].tokens[0]} tokens instead of {batch.tokens}")
        return seen


def largest_difference(results: dict[str, list[list[Observed]]]) -> float:
    """Return the largest difference of the sides' losses (over all ranks) in one step of one repeat."""
    steps = itertools.chain.from_iterable(
        zip(*(seen[0].losses for seen in repeat), strict=True)
        for repeat in zip(*results.values(), strict=True)
    )
    return max(max(losses) - min(losses) for losses in steps)


def report(results: dict[str, list[list[Observed]]], failed: dict[str, Failed]) -> str:
    """Return the table, with a row for each side. Losses: first and last step of the last repeat."""
    head = ["what", "real tokens/s", "phalanx is", "s a step", "peak memory of a rank", "losses"]
    speeds = {name: [seen[0].tokens_per_second() for seen in runs] for name, runs in results.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    rows = []
    for name, runs in results.items():
        ratio = f"{medians['phalanx'] / medians[name]:.2f} x" if "phalanx" in medians else ""
        seconds = spread([seen[0].seconds_per_step() for seen in runs], ".2f")
        memory = spread([max(rank.memory for rank in seen) / 2**20 for seen in runs]) + " MiB"
        losses = f"{runs[-1][0].losses[0]:.4f}, {runs[-1][0].losses[-1]:.4f}"
        rows.append([name, spread(speeds[name]), ratio, seconds, memory, losses])
    rows += [[name, f"not measured: {reason.reason}", "", "", "", ""] for name, reason in failed.items()]
    return table(head, rows)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--layers", type=int, default=6, help="keep the first layers; 0: all")
    parser.add_argument("--data", type=Path, required=True, help="JSONL rows (see above)")
    parser.add_argument("--join", type=int, default=1, help="rows of the data in one document")
    parser.add_argument("--trainer", choices=KINDS, default="sft")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a pack and of the longest row")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8,
                        help="rows or pairs in a micro-batch that is not packed; accumulation keeps the\n"
                             "step the same. 8 is TRL's default")  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--checkpointing", choices=("full", "none"), default="full")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="params only for phalanx")
    parser.add_argument("--only", nargs="+", help="only these sides")
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is not timed")
    kinds = KINDS[options.trainer]
    if unknown := set(options.only or ()) - set(kinds):
        parser.error(f"--only: unknown: {', '.join(sorted(unknown))}. Allowed: {', '.join(kinds)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    source = need_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cut = [sys.executable, str(BENCHMARKS / "cut_model.py"), str(source), "model"]
        cut += ["--layers", str(options.layers), *(["--score"] if options.trainer == "reward" else [])]
        run(cut, work)
        sides = Sides(options, work / "model", work)
        chosen = [kind for kind in KINDS[options.trainer] if not options.only or kind in options.only]
        kinds: dict[str, Callable[[int], list[Observed]]] = {k: partial(sides.run, k) for k in chosen}
        results, failed = alternate(
            kinds, options.repeats, lambda seen: f"{seen[0].tokens_per_second():.0f} tokens/s"
        )
        step = sides.batch(0)
    print(provenance("torch", "transformers", "trl", "accelerate"))
    size, times = micro_batches(options, step.rows)
    print(
        f"A step of the first repeat: {step.rows} rows, {step.tokens} tokens. Without packing, a rank takes "
        f"{times} micro-batches of {size} rows.\n"
    )
    print(report(results, failed))
    if len(results) > 1:
        difference = largest_difference(results)
        verdict = "agree" if difference <= EQUAL else "DIFFER"
        print(f"\nThe losses {verdict}: largest difference in a step {difference:.1e} (allowed {EQUAL:g}).")
        if difference > EQUAL:
            return 1
    return 1 if set(failed) - {"trl padding-free"} else 0


if __name__ == "__main__":
    sys.exit(main())
