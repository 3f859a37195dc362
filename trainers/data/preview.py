"""One row as the model sees it, for a person to check: what it is trained on, and what is masked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from trainers.data.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIM, _PLAIN = "\033[2m", "\033[0m"
LONGEST = 1000  # characters that are shown of a text


def show_example(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, terminal: bool) -> str:
    """The first row, decoded: masked parts dimmed on a terminal, in ⟦ ⟧ elsewhere."""
    lines = []
    for name, ids, trained in _texts(row):
        shown = ""
        pairs = zip(ids, trained, strict=True)
        for is_trained, run in groupby(pairs, key=lambda pair: pair[1]):
            text = str(tokenizer.decode([token for token, _ in run])).replace("\n", "\\n")
            if is_trained:
                shown += text
            else:
                shown += f"{_DIM}{text}{_PLAIN}" if terminal else f"⟦{text}⟧"
        more = f" ... ({len(ids)} tokens)" if len(shown) > LONGEST else ""
        end = _PLAIN if terminal and more else ""
        lines.append(f"{name}: {shown[:LONGEST]}{end}{more}")
    return "\n".join(lines)


def first_tokens(row: dict[str, Any]) -> list[int]:
    """The ids of a row's first text."""
    return next(iter(_texts(row)))[1]


def _texts(row: dict[str, Any]) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Name, ids, and which of them the loss sees, of each text of a row."""
    if "input_ids" in row:
        document: list[int] = list(row["input_ids"])
        yield "example", document, [label != IGNORED for label in row.get("labels", document)]
        return
    prompt = row.get("prompt_ids", [])
    for side in ("chosen", "rejected", "completion"):
        if (ids := row.get(f"{side}_ids")) is not None:
            label = f" ({'wanted' if row['label'] else 'unwanted'})" if side == "completion" else ""
            yield f"example, {side}{label}", prompt + ids, [False] * len(prompt) + [True] * len(ids)
