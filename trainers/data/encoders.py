"""Turns a row of the user's file into the tokens that a trainer takes: one encoder for each kind of trainer.

    default, sft, mlm   input_ids, labels
    dpo, orpo           prompt_ids, chosen_ids, rejected_ids
    kto                 prompt_ids, completion_ids, label
    reward              chosen_ids, rejected_ids         (each with its prompt)

A row that cannot be meant is an error that names it; one that teaches nothing is dropped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.data import chat
from trainers.data.chat import RowError, Turns
from trainers.data.columns import Columns
from trainers.data.labels import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

COUNTS = ("length", "supervised", "truncated", "dropped")  # columns beside the tokens, for the summary
# Words that a CSV file may hold for true and false.
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


class Dropped(Exception):
    """A row that teaches nothing; its text is the reason that is counted."""


@dataclass
class Sample:
    """What one row becomes: the trainer's columns, and what the summary counts."""

    tokens: dict[str, Any]
    length: int  # tokens of the whole row, before it was cut
    supervised: int  # tokens that the loss sees
    truncated: bool = False
    dropped: str = ""


@dataclass
class Encoder:
    """Batches of rows -> batches of samples, for `datasets.map`."""

    columns: Columns
    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    empty: dict[str, Any] = field(init=False)
    encode: Callable[[dict[str, Any]], list[Sample]] = field(init=False)

    def __post_init__(self) -> None:
        kind = self.config.kind
        self.empty = {name: False if name == "label" else [] for name in kind.columns}
        self.encode = {
            "text": self.language,
            "masked": self.masked,
            "scored_pair": self.compared,
            "prompted_pair": self.preferred,
            "labelled": self.wanted,
        }[kind.rows]

    def __call__(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        names = list(batch)
        samples: list[Sample] = []
        for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
            try:
                samples += self.encode(dict(zip(names, values, strict=True)))
            except Dropped as reason:
                samples.append(Sample(self.empty, 0, 0, dropped=str(reason)))
            except RowError as error:
                error.args = (str(error), number)
                raise
        out = {name: [sample.tokens[name] for sample in samples] for name in self.empty}
        return out | {name: [getattr(sample, name) for sample in samples] for name in COUNTS}

    # ------------------------------------------------------------------------------- language models

    def language(self, row: dict[str, Any]) -> list[Sample]:
        encoded = self.tokenized(row) if self.columns.kind == "tokens" else self.document(row)
        limit = None if self.config.packed == "wrapped" else self.config.sequence_length
        labels = encoded.labels[:limit]
        # The first token of a sequence is predicted from nothing, so it is never trained on.
        supervised = sum(label != IGNORED for label in labels[1:])
        length = len(encoded.input_ids)
        sample = Sample({"input_ids": encoded.input_ids[:limit], "labels": labels}, length, supervised)
        sample.truncated = limit is not None and length > limit
        if not supervised:
            return [Sample(self.empty, length, 0, sample.truncated, "no trained token")]
        return [sample]

    def masked(self, row: dict[str, Any]) -> list[Sample]:
        """A document for masked LM; one that is longer than block_size becomes several rows."""
        if self.columns.kind == "tokens":
            ids, size = self.tokenized(row).input_ids, self.config.sequence_length
            pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
        else:
            pieces = self.tokenizer(
                self.plain(row),
                truncation=True,
                max_length=self.config.sequence_length,
                return_overflowing_tokens=True,
                return_attention_mask=False,
            )["input_ids"]
            if pieces and isinstance(pieces[0], int):
                pieces = [pieces]
        special = set(self.tokenizer.all_special_ids)
        counted = [(piece, sum(token not in special for token in piece)) for piece in pieces]
        if not any(count for _, count in counted):
            raise Dropped("empty text")
        return [Sample({"input_ids": piece}, len(piece), count) for piece, count in counted if count]

    def plain(self, row: dict[str, Any]) -> str:
        """A row as one text, with the template where there is one."""
        turns = self.conversation(row)
        if turns is not None:
            return chat.render(self.tokenizer, turns)
        if self.columns.kind == "text":
            return self.string(row, self.columns.text, "empty text")
        return f"{self.prompt(row)}{self.string(row, self.columns.text, 'empty completion')}"

    def tokenized(self, row: dict[str, Any]) -> chat.Encoded:
        """Ids as they are; padding (attention_mask 0) is taken out."""
        ids, labels, mask = (row.get(name) for name in ("input_ids", "labels", "attention_mask"))
        if not ids:
            raise Dropped("empty text")
        labels = ids if labels is None else labels
        mask = ids if mask is None else mask
        if not all(isinstance(part, list) and len(part) == len(ids) for part in (ids, labels, mask)):
            raise RowError("input_ids, labels and attention_mask must be lists of one length.")
        vocabulary = range(len(self.tokenizer))
        if any(not isinstance(token, int) or token not in vocabulary for token in ids):
            raise RowError(
                f"input_ids must be whole numbers from 0 to {vocabulary[-1]}, the tokenizer's last."
            )
        if any(label != IGNORED and label not in vocabulary for label in labels):
            raise RowError(f"labels must be as input_ids, or {IGNORED} where nothing is trained on.")
        kept = [index for index in range(len(ids)) if mask is ids or mask[index]]
        if not kept:
            raise Dropped("empty text")
        return chat.Encoded([ids[index] for index in kept], [labels[index] for index in kept])

    def document(self, row: dict[str, Any]) -> chat.Encoded:
        config, tokenizer, train_all = self.config, self.tokenizer, self.config.trains_on_all
        turns = self.conversation(row)
        if turns is not None:
            return chat.encode_messages(tokenizer, turns, train_all)
        if self.columns.kind == "text":
            text = self.string(row, self.columns.text, "empty text")
            if config.train_on == "completion":
                raise RowError(
                    f"train_on: completion needs rows that tell the completion, and column "
                    f"'{self.columns.text}' has plain text. Set train_on: auto, or name a prompt_text_column."
                )
            return chat.encode_text(tokenizer, text, config.add_eos_token)
        prompt, text = self.prompt(row), self.string(row, self.columns.text, "empty completion")
        return chat.encode_completion(tokenizer, str(prompt), text, train_all, config.add_eos_token)

    def conversation(self, row: dict[str, Any]) -> Turns | None:
        """The row as turns for the template; None for plain text."""
        column, template = self.columns.text, self.config.chat_template
        turns = self.turns(row[column])
        if self.columns.kind == "completion":
            prompt = self.prompt(row)
            if turns is None and template is None and isinstance(prompt, str):
                return None
            if turns is None:
                text = self.string(row, column, "empty completion")
                turns = [{"role": "assistant", "content": text}]
            turns = [*self.asked(prompt), *turns]
        elif turns is None and template is None:
            return None
        elif turns is None:
            self.string(row, column, "empty text")
            raise RowError(
                f"chat_template: {template} needs messages, and column '{column}' has plain text. Set "
                "chat_template: null."
            )
        self.need_template()
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        if answers and not "".join(answers).strip():
            raise Dropped("empty completion")
        return turns

    # ------------------------------------------------------------------------------- preferences

    def preferred(self, row: dict[str, Any]) -> list[Sample]:
        """dpo and orpo: the prompt's end, and the start of both answers."""
        prompt, chosen, rejected = self.pair(row)
        if not prompt:
            raise RowError(
                f"{self.config.trainer} needs a prompt: name a column (prompt_text_column) or give messages."
            )
        kept = self.fit(prompt, chosen, rejected)
        length = len(prompt) + max(len(chosen), len(rejected))
        tokens = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), kept, strict=True))
        cut = sum(map(len, kept)) < len(prompt) + len(chosen) + len(rejected)
        return [Sample(tokens, length, len(kept[1]) + len(kept[2]), cut)]

    def compared(self, row: dict[str, Any]) -> list[Sample]:
        """reward: two whole texts. A pair that is too long is dropped: cut, it would mean something else."""
        prompt, chosen, rejected = self.pair(row)
        length = len(prompt) + max(len(chosen), len(rejected))
        if length > self.config.sequence_length:
            raise Dropped("longer than block_size")
        tokens = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        return [Sample(tokens, length, 2 * len(prompt) + len(chosen) + len(rejected))]

    def wanted(self, row: dict[str, Any]) -> list[Sample]:
        """kto: a completion with its label; a pair becomes a wanted and an unwanted one."""
        if self.columns.kind == "pair":
            prompt, chosen, rejected = self.pair(row)
            answers = [(chosen, True), (rejected, False)]
        else:
            prompt, ids = self.answer(row, self.columns.text)
            answers = [(ids, self.label(row))]
        if not prompt:
            raise RowError("kto needs a prompt: name a column (prompt_text_column) or give messages.")
        samples = []
        kept_prompt, *fitted = self.fit(prompt, *(ids for ids, _ in answers))
        for (ids, label), kept in zip(answers, fitted, strict=True):
            tokens = {"prompt_ids": kept_prompt, "completion_ids": kept, "label": label}
            cut = len(kept_prompt) + len(kept) < len(prompt) + len(ids)
            samples.append(Sample(tokens, len(prompt) + len(ids), len(kept), cut))
        return samples

    def pair(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
        """Ids of the prompt, the chosen and the rejected answer; the last turn of messages is the answer."""
        columns = self.columns
        assert columns.rejected is not None
        chosen, rejected = self.turns(row[columns.text]), self.turns(row[columns.rejected])
        if (chosen is None) != (rejected is None):
            self.string(row, columns.text if chosen is None else columns.rejected, "empty completion")
            raise RowError(f"'{columns.text}' and '{columns.rejected}' must both be text or both messages.")
        if chosen is not None and rejected is not None and chosen[:-1] != rejected[:-1]:
            raise Dropped("chosen and rejected differ before their last turn")
        prompt, chosen_ids = self.answer(row, columns.text)
        other, rejected_ids = self.answer(row, columns.rejected)
        if chosen_ids == rejected_ids:
            raise Dropped("chosen equals rejected")
        assert prompt == other
        return prompt, chosen_ids, rejected_ids

    def answer(self, row: dict[str, Any], column: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer in `column`; turns before the answer are its prompt."""
        turns = self.turns(row[column])
        if turns is not None:
            if turns[-1]["role"] != "assistant":
                raise RowError(
                    f"the last turn of '{column}' must be the assistant's, not {turns[-1]['role']}'s."
                )
            if not turns[-1]["content"].strip():
                raise Dropped("empty completion")
            self.need_template()
            before = turns[:-1]
            if not before:
                prompt = self.prompt(row)
                if prompt is None:
                    raise RowError(
                        f"column '{column}' holds an answer alone. Give the turns before it, or name the "
                        "prompt's column (prompt_text_column)."
                    )
                before = self.asked(prompt)
            return chat.encode_answer(self.tokenizer, before, turns[-1]["content"])
        prompt, text = self.prompt(row), self.string(row, column, "empty completion")
        if self.config.chat_template is not None and prompt is not None:
            return chat.encode_answer(self.tokenizer, self.asked(prompt), text)
        if self.config.chat_template is not None:
            raise RowError(
                f"chat_template: {self.config.chat_template} needs messages or a prompt column, and "
                f"'{column}' has plain text alone. Set chat_template: null, or prompt_text_column."
            )
        if prompt is not None and not isinstance(prompt, str):
            self.need_template()
        eos = self.config.add_eos_token
        if prompt is None:  # reward: the whole text in one column
            return [], chat.encode_text(self.tokenizer, text, eos).input_ids
        before_ids = chat.encode_text(self.tokenizer, str(prompt), eos=False).input_ids
        whole = chat.encode_completion(self.tokenizer, str(prompt), text, False, eos)
        return before_ids, whole.input_ids[len(before_ids) :]

    def fit(self, prompt: list[int], *answers: list[int]) -> tuple[list[int], ...]:
        """Cuts the prompt at its start, and the answers at their end, to the lengths of the config."""
        block = self.config.sequence_length
        prompt = prompt[-min(self.config.max_prompt_length, block) :]
        room = min(block - len(prompt), self.config.max_completion_length or block)
        if room < 1:
            raise Dropped("the prompt leaves no room for a completion")
        cut = [answer[:room] for answer in answers]
        if len(cut) == 2 and cut[0] == cut[1]:
            raise Dropped("chosen equals rejected where they are cut")
        return (prompt, *cut)

    def label(self, row: dict[str, Any]) -> bool:
        assert self.columns.label is not None
        value = _TRUTH.get(str(row[self.columns.label]).strip().lower())
        if value is None:
            raise RowError(
                f"column '{self.columns.label}' must say true or false, not {row[self.columns.label]!r}."
            )
        return value

    # ------------------------------------------------------------------------------- columns

    def prompt(self, row: dict[str, Any]) -> str | Turns | None:
        """What comes before the answer: text, turns, or None where the row has no prompt."""
        if self.config.prompt_format is not None:
            parsed = Formatter().parse(self.config.prompt_format)
            return "".join(
                literal + ("" if name is None or row[name] is None else str(row[name]))
                for literal, name, _, _ in parsed
            )
        if self.columns.instruction:
            return self.instruction(row)
        if self.columns.prompt is None:
            return None
        return self.turns(row[self.columns.prompt]) or self.string(row, self.columns.prompt, "empty prompt")

    def instruction(self, row: dict[str, Any]) -> str:
        """instruction and input as one prompt: a chat turn, or Alpaca's headings without a template."""
        asked, given = self.string(row, "instruction", "empty prompt"), row.get("input") or ""
        if self.config.chat_template == "alpaca":
            return f"{asked}\n\n### Input:\n{given}" if given else asked
        if self.config.chat_template is not None:
            return f"{asked}\n\n{given}" if given else asked
        part = f"### Input:\n{given}\n\n" if given else ""
        return f"### Instruction:\n{asked}\n\n{part}### Response:\n"

    def asked(self, prompt: str | Turns | None) -> Turns:
        return prompt if isinstance(prompt, list) else [{"role": "user", "content": str(prompt)}]

    def turns(self, value: Any) -> Turns | None:
        return chat.parse_messages(value)

    def need_template(self) -> None:
        if self.config.chat_template is None:
            raise RowError(
                "chat_template: the row holds messages, which need a template. Set chat_template: tokenizer, "
                "chatml or zephyr."
            )

    def string(self, row: dict[str, Any], column: str, empty: str) -> str:
        """The text of a column; nothing but white space is `empty`, a reason to drop the row."""
        value = row[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            raise Dropped(empty)
        if not isinstance(value, str):
            raise RowError(f"column '{column}' must hold text or messages, not {type(value).__name__}.")
        return value


def check_label_balance(labels: list[bool]) -> None:
    """kto weighs wanted against unwanted completions; with one kind alone it has nothing to learn from.

    Raises:
        ConfigError: all labels are the same.
    """
    if len(set(labels)) < 2:
        raise ConfigError(
            f"data.column_mapping.label_column: all {len(labels)} rows have the label {labels[0]}. kto needs "
            "both wanted and unwanted completions."
        )
