"""Show samples as the model sees them, so that a person can check what is trained on and what is masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from trainers.config.text import printable
from trainers.data.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIM, _PLAIN = "\033[2m", "\033[0m"
LONGEST = 1000  # characters of a text that are shown


@dataclass(frozen=True)
class ShownText:
    """A text of a sample, in parts: each with whether the loss sees it."""

    name: str  # chosen, rejected, completion (wanted); or "", if the sample has only this text
    parts: list[tuple[str, bool]]
    tokens: int


def show_example(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, terminal: bool, source: str = ""
) -> str:
    """Return the decoded sample. Masked parts are dimmed on a terminal, and in ⟦ ⟧ elsewhere.

    `source`: the name of its source in a mix.
    """
    lines = []
    for text in shown_texts(row, tokenizer):
        parts = [(printable(part.replace("\n", "\\n")), trained) for part, trained in text.parts]
        shown = "".join(marked(part, trained, terminal) for part, trained in parts)
        more = f" ... ({text.tokens} tokens)" if len(shown) > LONGEST else ""
        end = _PLAIN if terminal and more else ""
        name = ", ".join(filter(None, ("example", text.name))) + (f" ({source})" if source else "")
        lines.append(f"{name}: {shown[:LONGEST]}{end}{more}")
    return "\n".join(lines)


def marked(text: str, trained: bool, terminal: bool) -> str:
    """Return a part of a text. What the loss does not see is dim on a terminal, and in ⟦ ⟧ elsewhere."""
    if trained:
        return text
    return f"{_DIM}{text}{_PLAIN}" if terminal else f"⟦{text}⟧"


def shown_texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[ShownText]:
    """Return the texts of a sample, decoded."""
    found = []
    for name, ids, trained in _texts(row):
        parts, end, before = [], 0, ""
        for is_trained, run in groupby(trained):
            start, end = end, end + sum(1 for _ in run)
            # Some tokenizers drop the space before the first token, so a part is not decoded alone.
            until = decoded(ids[:end], tokenizer)
            part = until[len(before) :] if until.startswith(before) else decoded(ids[start:end], tokenizer)
            parts.append((part, is_trained))
            before = until
        found.append(ShownText(name, parts, len(ids)))
    return found


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of these tokens, with special tokens."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def first_tokens(row: dict[str, Any]) -> list[int]:
    """Return the ids of a sample's first text."""
    return next(iter(_texts(row)))[1]


def _texts(row: dict[str, Any]) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Yield the name, the ids, and which ids the loss sees, for each text of a sample."""
    if "input_ids" in row:
        document: list[int] = list(row["input_ids"])
        yield "", document, [label != IGNORED for label in row.get("labels", document)]
        return
    prompt = row.get("prompt_ids", [])
    for side in ("chosen", "rejected", "completion"):
        if (ids := row.get(f"{side}_ids")) is not None:
            label = f" ({'wanted' if row['label'] else 'unwanted'})" if side == "completion" else ""
            yield f"{side}{label}", prompt + ids, [False] * len(prompt) + [True] * len(ids)
