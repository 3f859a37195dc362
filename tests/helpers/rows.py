"""Rows of every kind: a question, with a good and a bad answer."""

from __future__ import annotations

import json
from typing import Any

# The trainers whose loss is on one text, and those that read preferences.
TEXTS = ("default", "sft", "mlm")
PAIRS = ("reward", "dpo", "orpo", "kto")
FORMATS = ("jsonl", "csv", "parquet")
EACH = [(trainer, suffix) for trainer in (*TEXTS, *PAIRS) for suffix in ("jsonl", "csv")]
Q, GOOD, BAD = "What is a rank?", "One process of many.", "A number."
END = "<|im_end|>"  # EOS of the tiny model, which ends a turn
PROMPT = f"<|im_start|>user\n{Q}{END}\n<|im_start|>assistant\n"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be short."}
TURNS, OTHER = ([user(Q), assistant(answer)] for answer in (GOOD, BAD))
PAIR = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
LABELLED = [
    {"prompt": Q, "completion": GOOD, "label": True},
    {"prompt": Q, "completion": BAD, "label": False},
]


def in_format(suffix: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows for this format. In a CSV file, lists are JSON."""
    if suffix != "csv":
        return list(rows)
    return [
        {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
        for row in rows
    ]


def trained_text(tokenizer: Any, sample: dict[str, Any]) -> str:
    """Return the text that the loss sees."""
    return str(tokenizer.decode([label for label in sample["labels"] if label != -100]))
