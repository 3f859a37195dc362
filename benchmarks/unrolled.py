"""Measure what it could save to compute the shared beginning of unrolled samples once.

    python examples/get_model.py .demo/SmolLM2-135M-Instruct
    python benchmarks/unrolled.py --data instructions.jsonl [--repeats 7]

Qwen3's template drops the reasoning of earlier turns, so a conversation of N turns with reasoning becomes N
samples (`history: unroll`), which begin alike. First table: the tokens that are computed, those that would be
if each beginning were computed once, and their ratio: the most that could be saved. Second table: forward and
backward of the model's body (6 layers, float32) on conversations of two turns, computed as now, and with
the beginning computed once. documents_attention can do that for two sequences, as for preference pairs.

--data: JSONL rows of instruction, input and output. A turn is a row, its reasoning the output of another one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from measure import MODEL, alternate, need_model, need_rows, provenance, question, spread, table, write_rows

TURNS, TIMED_TURNS, CONVERSATIONS, LAYERS = (2, 4, 8), 2, 64, 6
Samples = list[list[int]]


def conversations(data: Sequence[dict[str, Any]], turns: int) -> list[dict[str, Any]]:
    """Return rows of `turns` questions with reasoning and an answer each."""
    drawn, out = np.random.default_rng(turns), []
    for _ in range(CONVERSATIONS):
        messages: list[dict[str, Any]] = []
        for number in drawn.integers(0, len(data), turns):
            answer, thought = data[number]["output"], data[number - 1]["output"]
            messages += [
                {"role": "user", "content": question(data[number])},
                {"role": "assistant", "reasoning_content": thought or "-", "content": answer or "None."},
            ]
        out.append({"messages": messages})
    return out


def unrolled(data: Sequence[dict[str, Any]], turns: int, model: Path) -> Samples:
    """Return the token ids of the samples, conversation by conversation, as training reads them."""
    from trainers.config.schema import TrainConfig
    from trainers.data.prepare import prepare
    from trainers.model.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "train.jsonl", conversations(data, turns))
        config = TrainConfig(
            model=str(model), trainer="sft", data_path=folder, history="unroll", text_column="messages",
            block_size=32_768, model_max_length=32_768,
            chat_template=str(files("trl") / "chat_templates" / "qwen3.jinja"),
        )  # fmt: skip
        tokenizer, _ = load_tokenizer(config)
        found = prepare(config, tokenizer).dataset
        assert len(found) == turns * CONVERSATIONS
        return [list(ids) for ids in found["input_ids"]]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two samples have in common at their beginning."""
    pairs = zip(a, b, strict=False)
    return next((number for number, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def distinct(samples: Samples, turns: int) -> int:
    """Return the tokens that are left if what samples of a conversation share is counted once."""
    count = 0
    for first in range(0, len(samples), turns):
        group = samples[first : first + turns]
        for number, ids in enumerate(group):
            count += len(ids) - max((common(ids, other) for other in group[:number]), default=0)
    return count


def seconds(body: Any, batches: Sequence[tuple[Any, Any]], share: bool, repeat: int) -> float:
    """Return the time of forward and backward over all batches."""
    from trainers.model.padding_free import flat_inputs, share_flat

    began = time.monotonic()
    for ids, mask in batches:
        flat, source = share_flat(ids, mask) if share else (flat_inputs(ids, mask), None)
        hidden = body(**flat).last_hidden_state[0]
        (hidden if source is None else hidden.index_select(0, source)).square().mean().backward()
        body.zero_grad()
    return time.monotonic() - began


def timed(samples: Samples, options: Namespace) -> list[list[str]]:
    import torch
    from transformers import AutoModelForCausalLM

    from trainers.model.attention import implementation

    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.float32,
        num_hidden_layers=LAYERS,
        attn_implementation=implementation("documents"),
    )
    batches = []
    for begin in range(0, len(samples) // 2, 8):  # sequences i and i + 4 are of one conversation
        group = samples[begin : begin + 8 : 2] + samples[begin + 1 : begin + 8 : 2]
        ids = torch.zeros(len(group), max(map(len, group)), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for number, each in enumerate(group):
            ids[number, : len(each)], mask[number, : len(each)] = torch.tensor(each), True
        batches.append((ids, mask))
    kinds = {
        name: partial(seconds, model.base_model, batches, share)
        for name, share in (("as now", False), ("beginning computed once", True))
    }
    results, failed = alternate(kinds, options.repeats, lambda value: f"{value:.1f} s")
    if failed:
        raise SystemExit(str(next(iter(failed.values()))))
    return [[name, f"{spread(values, '.2f')} s"] for name, values in results.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(argv)
    options.model = need_model(options.model)
    data = [row for row in need_rows(options.data) if row["output"].strip()]
    samples = {turns: unrolled(data, turns, options.model) for turns in TURNS}
    counts = {t: (sum(map(len, each)), distinct(each, t)) for t, each in samples.items()}
    print(provenance("torch", "transformers", "trl"))
    print(table(
        ["turns", "tokens computed", "with each beginning once", "ratio"],
        [[str(t), f"{now:,}", f"{least:,}", f"{now / least:.2f}"] for t, (now, least) in counts.items()],
    ))  # fmt: skip
    print()
    print(table(["conversations of two turns", "forward and backward"], timed(samples[TIMED_TURNS], options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
