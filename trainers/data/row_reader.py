"""Read the columns of a row: text, messages, a prompt, tools, a label."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import TYPE_CHECKING, Any

from trainers.config.schema import TrainConfig
from trainers.data.chat import Renderer
from trainers.data.columns import Columns
from trainers.data.messages import (
    Chat,
    Message,
    Turns,
    read_dialogue,
    read_messages,
    read_options,
    read_tools,
)
from trainers.data.samples import Dropped, RowError
from trainers.data.templates import TEMPLATES
from trainers.data.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The spellings of true and false that a label may have.
_TRUTH = {
    "true": True,
    "1": True,
    "1.0": True,
    "yes": True,
    "false": False,
    "0": False,
    "0.0": False,
    "no": False,
}


@dataclass
class RowReader:
    """The base of the encoders: which columns to read, and how."""

    columns: Columns
    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.tokenizer)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.tokens, self.config.history, self.config.unrendered)

    @property
    def empty(self) -> dict[str, Any]:
        """The columns of a dropped row, without values."""
        return {name: False if name == "label" else [] for name in self.config.kind.columns}

    def prompt(self, row: dict[str, Any]) -> str | Turns | None:
        """Return what comes before the answer: text, messages, or None if the row has no prompt."""
        if self.config.prompt_format is not None:
            parsed = Formatter().parse(self.config.prompt_format)
            return "".join(
                literal + ("" if name is None or row[name] is None else str(row[name]))
                for literal, name, _, _ in parsed
            )
        if self.columns.instruction:
            asked = self.instruction(row)
            return self.with_history(row, asked) if self.columns.history else asked
        if self.columns.prompt is None:
            return None
        turns, _ = self.turns(row, self.columns.prompt)
        return turns or self.string(row, self.columns.prompt, "empty prompt")

    def instruction(self, row: dict[str, Any]) -> str:
        """Return instruction and input as one prompt: for a template, or else with Alpaca's headings."""
        asked, given = self.string(row, "instruction", "empty prompt"), row.get("input") or ""
        if self.config.chat_template == "alpaca":
            return f"{asked}\n\n### Input:\n{given}" if given else asked
        if self.config.chat_template is not None:
            return f"{asked}\n\n{given}" if given else asked
        part = f"### Input:\n{given}\n\n" if given else ""
        return f"### Instruction:\n{asked}\n\n{part}### Response:\n"

    def with_history(self, row: dict[str, Any], asked: str) -> str | Turns:
        """Return an instruction after the earlier turns of its row, which are pairs."""
        pairs = row[str(self.columns.history)] or []
        if not isinstance(pairs, list) or any(
            not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair)
            for pair in pairs
        ):
            raise RowError("column 'history' must hold pairs of an instruction and its output.")
        if not pairs:
            return asked
        if self.config.chat_template is None:
            before = (f"### Instruction:\n{a}\n\n### Response:\n{b}\n\n" for a, b in pairs)
            return "".join(before) + asked
        turns: Turns = []
        for question, answer in pairs:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*turns, *self.as_turns(asked)]

    def as_turns(self, prompt: str | Turns | None) -> Turns:
        """Return the prompt as messages."""
        return prompt if isinstance(prompt, list) else [{"role": "user", "content": str(prompt)}]

    def turns(self, row: dict[str, Any], column: str) -> tuple[Turns | None, frozenset[int]]:
        """Return the messages of a column, or None if the column has plain text or this row is empty.

        The kind of a column is the same for all rows of a split (column_kinds.py).
        """
        value = row[column]
        if column in self.columns.dialogues and self.config.chat_template and value and value.strip():
            return read_dialogue(value), frozenset()
        if column not in self.columns.messages or _is_empty(value):
            return None, frozenset()
        return read_messages(value)

    def chat(self, row: dict[str, Any], turns: Turns, ignored: frozenset[int] = frozenset()) -> Chat:
        """Return a conversation with the tools, the options and the system turn of its row."""
        self.need_template()
        options = {
            **(self.config.chat_template_kwargs or {}),
            **read_options(row.get("chat_template_kwargs")),
        }
        chat = Chat(turns, read_tools(row.get("tools")), options, ignored)
        system = self.system(row)
        return chat if system is None or turns[0]["role"] == "system" else chat.after(system)

    def system(self, row: dict[str, Any]) -> Message | None:
        """Return the system turn that a row, or else the config, gives to a conversation."""
        text = row.get(self.columns.system) if self.columns.system else None
        if text is not None and not isinstance(text, str):
            raise RowError(f"column '{self.columns.system}' must hold text, not {type(text).__name__}.")
        text = text if text and text.strip() else self.config.system_prompt
        return {"role": "system", "content": text} if text else None

    def unused(self, row: dict[str, Any]) -> set[str]:
        """Return notes on columns of a plain text that only a template can use."""
        names = (self.columns.system, "tools", "chat_template_kwargs")
        return {
            f"the column {name} is not used without a template" for name in names if name and row.get(name)
        }

    def need_template(self) -> None:
        """Raise RowError if the config has no chat template."""
        if self.config.chat_template is None:
            raise RowError(
                "chat_template: the row has messages, which need a template. Set chat_template: tokenizer "
                f"(the model's), or {', '.join(TEMPLATES)}."
            )

    def string(self, row: dict[str, Any], column: str, empty: str) -> str:
        """Return the text of a column.

        Raises:
            Dropped: the column is empty, has only white space or no message. `empty` is the reason.
            RowError: the column does not have text.
        """
        value = row[column]
        if _is_empty(value):
            raise Dropped(empty)
        if not isinstance(value, str):
            raise RowError(f"column '{column}' must hold text or messages, not {type(value).__name__}.")
        return value

    def label(self, row: dict[str, Any]) -> bool:
        assert self.columns.label is not None
        value = _TRUTH.get(str(row[self.columns.label]).strip().lower())
        if value is None:
            raise RowError(
                f"column '{self.columns.label}' must be true or false, not {row[self.columns.label]!r}."
            )
        return value


def _is_empty(value: Any) -> bool:
    """Return whether a column has nothing: null, no message, or white space."""
    return value is None or value == [] or (isinstance(value, str) and value.strip() == "")
