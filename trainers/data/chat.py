"""Turn a row into token ids and labels: templates, masks, EOS. The loss ignores labels of -100.

ids     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n  Hello<|im_end|>  \\n
labels  ...................... -100 ......................... ^^^^^^^^^^^^^^^^^  -100
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.data.labels import IGNORED
from trainers.data.samples import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {"human": "user", "gpt": "assistant", "developer": "system", "function": "tool"}

Turns = list[dict[str, str]]


@dataclass
class Encoded:
    """The token ids and labels of one row, of equal length."""

    input_ids: list[int]
    labels: list[int]


def forget_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    """Remove truncation and padding from the settings of the tokenizer.

    A call that truncates or pads leaves these settings in the tokenizer. They would be saved with the model.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def parse_messages(value: Any) -> Turns | None:
    """Return the messages in a list, a JSON string or a Python literal (CSV files contain both).

    Returns None for plain text.

    Raises:
        RowError: the value is a list, but not a conversation.
    """
    if isinstance(value, str):
        value = _parse_list(value.strip())
        # Plain text may begin like a list, for example "[1] A footnote".
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            return None
    if not isinstance(value, list):
        return None
    turns: Turns = []
    for turn in value:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(
                f'a message must be {{"role": "...", "content": "..."}} (both text), not {_short(turn)}.'
            )
        role = _ROLE_NAMES.get(role, role)
        if role not in ROLES:
            raise RowError(f"there is no role '{role}'. Allowed: {', '.join(ROLES)}.")
        if role == "system" and turns:
            raise RowError("a system turn must be the first turn of its conversation.")
        turns.append({"role": role, "content": content})
    if not turns:
        raise RowError("a conversation needs at least one message.")
    return turns


def _parse_list(text: str) -> Any:
    if not text.startswith("["):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns, prompt: bool = False) -> str:
    """Return the text of a conversation. With `prompt`, the text ends where the assistant must answer.

    Raises:
        RowError: the template rejects these turns.
    """
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:
        # A template is a program written by the model's author. It may raise any exception.
        roles = ", ".join(turn["role"] for turn in turns)
        raise RowError(f"chat_template: the template rejects the turns ({roles}): {error}") from error


def encode_messages(tokenizer: PreTrainedTokenizerBase, turns: Turns, train_all: bool) -> Encoded:
    """Render and tokenize a conversation. The loss sees the assistant's turns and their ends, or everything.

    The text is cut where each turn of the assistant begins and ends, and each part is tokenized separately.
    The model sees the same parts when it generates an answer.

    Raises:
        RowError: the template rewrites earlier turns, so the assistant's turns cannot be located.
    """
    full = render(tokenizer, turns)
    out = Encoded([], [])
    if train_all:
        _append(out, tokenizer, full, True)
        return out
    position = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = render(tokenizer, turns[:index], prompt=True), render(tokenizer, turns[: index + 1])
        if not (full.startswith(before) and full.startswith(after)):
            raise RowError(
                "chat_template: this template changes earlier turns, so the assistant's turns cannot be "
                "located. Set train_on: all."
            )
        _append(out, tokenizer, full[position : len(before)], False)
        _append(out, tokenizer, full[len(before) : len(after)], True)
        position = len(after)
    _append(out, tokenizer, full[position:], False)
    return out


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, answer: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation up to the answer, and the ids of the answer with the end of its turn.

    Raises:
        RowError: the template renders the prompt differently when an answer follows it.
    """
    before = render(tokenizer, turns, prompt=True)
    full = render(tokenizer, [*turns, {"role": "assistant", "content": answer}])
    if not full.startswith(before):
        raise RowError(
            "chat_template: this template changes the prompt when an answer follows it. Use another template."
        )
    ids = list(tokenizer(full[len(before) :], add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end in ids:  # the model never generates what the template writes after the end of a turn
        ids = ids[: len(ids) - ids[::-1].index(end)]
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]), ids


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, train_all: bool, eos: bool
) -> Encoded:
    """Encode a prompt and its completion as plain text.

    The loss sees the completion and EOS, or everything.
    """
    out = encode_text(tokenizer, prompt, eos=False)
    if not train_all:
        out.labels = [IGNORED] * len(out.input_ids)
    _append(out, tokenizer, completion, True)
    _end(out, tokenizer, eos)
    return out


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, eos: bool) -> Encoded:
    """Encode plain text with the tokenizer's BOS (once) and, with `eos`, with EOS (once)."""
    ids = list(tokenizer(text)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    out = Encoded(ids, list(ids))
    _end(out, tokenizer, eos)
    return out


def _append(out: Encoded, tokenizer: PreTrainedTokenizerBase, text: str, supervised: bool) -> None:
    if not text:
        return
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    labels = list(ids) if supervised else [IGNORED] * len(ids)
    if supervised and tokenizer.eos_token_id in ids:
        # The model never generates what the template writes after the end of the turn (a newline).
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        labels[end:] = [IGNORED] * (len(ids) - end)
    out.input_ids += ids
    out.labels += labels


def _end(out: Encoded, tokenizer: PreTrainedTokenizerBase, eos: bool) -> None:
    token = tokenizer.eos_token_id
    if eos and token is not None and out.input_ids[-1:] != [token]:
        out.input_ids.append(token)
        out.labels.append(token)
