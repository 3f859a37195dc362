"""Show one sample as the model sees it, so that a person can check what is trained on and what is masked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from trainers.data.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIM, _PLAIN = "\033[2m", "\033[0m"
LONGEST = 1000  # characters of a text that are shown


def show_example(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, terminal: bool, source: str = ""
) -> str:
    """Return the decoded sample. Masked parts are dimmed on a terminal, and in ⟦ ⟧ elsewhere.

    `source`: the name of its source in a mix.
    """
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
        name += f" ({source})" if source else ""
        lines.append(f"{name}: {shown[:LONGEST]}{end}{more}")
    return "\n".join(lines)


def first_tokens(row: dict[str, Any]) -> list[int]:
    """Return the ids of a sample's first text."""
    return next(iter(_texts(row)))[1]


def _texts(row: dict[str, Any]) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Yield the name, the ids, and which ids the loss sees, for each text of a sample."""
    if "input_ids" in row:
        document: list[int] = list(row["input_ids"])
        yield "example", document, [label != IGNORED for label in row.get("labels", document)]
        return
    prompt = row.get("prompt_ids", [])
    for side in ("chosen", "rejected", "completion"):
        if (ids := row.get(f"{side}_ids")) is not None:
            label = f" ({'wanted' if row['label'] else 'unwanted'})" if side == "completion" else ""
            yield f"example, {side}{label}", prompt + ids, [False] * len(prompt) + [True] * len(ids)
