"""Turns a row into token ids and labels: templates, masks, EOS. Labels of -100 are not trained on.

ids     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n  Hello<|im_end|>  \\n
labels  ...................... -100 ......................... ^^^^^^^^^^^^^^^^^  -100
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass
class Encoded:
    """Token ids and labels of one row, of equal length."""

    input_ids: list[int]
    labels: list[int]


def set_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> list[str]:
    """Gives the tokenizer the template that the config names; returns the tokens that the vocabulary gained.

    Raises:
        ConfigError: `tokenizer` was asked for and the tokenizer has none.
    """
    if name == "tokenizer" and not tokenizer.chat_template:
        raise ConfigError("chat_template: this model's tokenizer has none. Use chatml or zephyr.")
    if name == "chatml":
        tokenizer.chat_template = CHATML
        gained = _add_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"])
        tokenizer.eos_token = "<|im_end|>"
        return gained
    if name == "zephyr":
        tokenizer.chat_template = ZEPHYR
        return _add_tokens(tokenizer, ["<|system|>", "<|user|>", "<|assistant|>"])
    return []


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[str]:
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    return new


def parse_messages(value: Any) -> list[dict[str, str]] | None:
    """Messages from a list, a JSON string or a Python literal (CSV files hold both); None for plain text."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("["):
            return None
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
                break
            except (ValueError, SyntaxError):
                continue
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    roles = {"human": "user", "gpt": "assistant"}
    turns = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role is None or content is None:
            return None
        turns.append({"role": roles.get(role, role), "content": content})
    return turns


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], train_all: bool
) -> Encoded:
    """Renders a conversation; the loss sees the assistant's turns and their ends, or everything.

    The text is tokenized piece by piece, cut where the assistant begins and ends: those are the pieces that
    the model meets when it answers.

    Raises:
        ConfigError: the template rewrites earlier turns, so that the assistant's part cannot be told.
    """

    def render(upto: int, prompt: bool = False) -> str:
        text = tokenizer.apply_chat_template(turns[:upto], tokenize=False, add_generation_prompt=prompt)
        return str(text)

    whole = render(len(turns))
    out = Encoded([], [])
    if train_all:
        _append(out, tokenizer, whole, True)
        return out
    position = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise ConfigError(
                "chat_template: this template changes earlier turns, so the assistant's part cannot be told. "
                "Set train_on: all."
            )
        _append(out, tokenizer, whole[position : len(before)], False)
        _append(out, tokenizer, whole[len(before) : len(after)], True)
        position = len(after)
    _append(out, tokenizer, whole[position:], False)
    return out


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, train_all: bool, eos: bool
) -> Encoded:
    """A prompt and its completion as plain text; the loss sees the completion and EOS, or everything."""
    out = encode_text(tokenizer, prompt, eos=False)
    if not train_all:
        out.labels = [IGNORED] * len(out.input_ids)
    _append(out, tokenizer, completion, True)
    _end(out, tokenizer, eos)
    return out


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, eos: bool) -> Encoded:
    """Plain text, with the tokenizer's own BOS (once) and, if asked, EOS (once)."""
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
        # What a template writes after the end of the turn (a newline) is never generated.
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        labels[end:] = [IGNORED] * (len(ids) - end)
    out.input_ids += ids
    out.labels += labels


def _end(out: Encoded, tokenizer: PreTrainedTokenizerBase, eos: bool) -> None:
    token = tokenizer.eos_token_id
    if eos and token is not None and out.input_ids[-1:] != [token]:
        out.input_ids.append(token)
        out.labels.append(token)
