"""Encode rows of default, sft and mlm: one sample per row, or several for mlm."""

from __future__ import annotations

from typing import Any

from trainers.data import chat
from trainers.data.chat import Turns
from trainers.data.labels import IGNORED
from trainers.data.row_reader import RowReader
from trainers.data.samples import Dropped, RowError, Sample


class LanguageRows(RowReader):
    """An encoder for rows whose loss is on the tokens of one text."""

    def language(self, row: dict[str, Any]) -> list[Sample]:
        """Return the sample of a row for default and sft."""
        encoded = self.tokenized(row) if self.columns.kind == "tokens" else self.document(row)
        limit = None if self.config.packed == "wrapped" else self.config.sequence_length
        labels = encoded.labels[:limit]
        # Nothing precedes the first token of a sequence, so the loss never sees it.
        supervised = sum(label != IGNORED for label in labels[1:])
        length = len(encoded.input_ids)
        sample = Sample({"input_ids": encoded.input_ids[:limit], "labels": labels}, length, supervised)
        sample.truncated = limit is not None and length > limit
        if not supervised:
            return [Sample(self.empty, length, 0, sample.truncated, "no trained token")]
        return [sample]

    def masked(self, row: dict[str, Any]) -> list[Sample]:
        """Return the samples of a row for mlm. A row longer than block_size becomes several samples."""
        if self.columns.kind == "tokens":
            ids, size = self.tokenized(row).input_ids, self.config.sequence_length
            parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        else:
            parts = self.tokenizer(
                self.plain(row),
                truncation=True,
                max_length=self.config.sequence_length,
                return_overflowing_tokens=True,
                return_attention_mask=False,
            )["input_ids"]
            if parts and isinstance(parts[0], int):
                parts = [parts]
        special = set(self.tokenizer.all_special_ids)
        counted = [(part, sum(token not in special for token in part)) for part in parts]
        if not any(count for _, count in counted):
            raise Dropped("empty text")
        return [Sample({"input_ids": part}, len(part), count) for part, count in counted if count]

    def plain(self, row: dict[str, Any]) -> str:
        """Return a row as one text, rendered with the template if there is one."""
        turns = self.conversation(row)
        if turns is not None:
            return chat.render(self.tokenizer, turns)
        if self.columns.kind == "text":
            return self.string(row, self.columns.text, "empty text")
        return f"{self.prompt(row)}{self.string(row, self.columns.text, 'empty completion')}"

    def tokenized(self, row: dict[str, Any]) -> chat.Encoded:
        """Return the token ids of a row unchanged, but without padding (where attention_mask is 0)."""
        ids, labels, mask = (row.get(name) for name in ("input_ids", "labels", "attention_mask"))
        if not ids:
            raise Dropped("empty text")
        labels = ids if labels is None else labels
        mask = ids if mask is None else mask
        if not all(isinstance(part, list) and len(part) == len(ids) for part in (ids, labels, mask)):
            raise RowError("input_ids, labels and attention_mask must be lists of equal length.")
        vocabulary = range(len(self.tokenizer))
        if any(not isinstance(token, int) or token not in vocabulary for token in ids):
            raise RowError(
                f"input_ids must be integers from 0 to {vocabulary[-1]}, the last id of the tokenizer."
            )
        if any(label != IGNORED and label not in vocabulary for label in labels):
            raise RowError(f"labels must be token ids, or {IGNORED} for tokens that the loss ignores.")
        kept = [index for index in range(len(ids)) if mask is ids or mask[index]]
        if not kept:
            raise Dropped("empty text")
        return chat.Encoded([ids[index] for index in kept], [labels[index] for index in kept])

    def document(self, row: dict[str, Any]) -> chat.Encoded:
        """Return the ids and labels of a row with text or messages."""
        config, tokenizer, train_all = self.config, self.tokenizer, self.config.trains_on_all
        turns = self.conversation(row)
        if turns is not None:
            return chat.encode_messages(tokenizer, turns, train_all)
        if self.columns.kind == "text":
            text = self.string(row, self.columns.text, "empty text")
            if config.train_on == "completion":
                raise RowError(
                    f"train_on: completion needs rows with a separate completion, and column "
                    f"'{self.columns.text}' has plain text. Set train_on: auto, or name a prompt_text_column."
                )
            return chat.encode_text(tokenizer, text, config.add_eos_token)
        prompt, text = self.prompt(row), self.string(row, self.columns.text, "empty completion")
        return chat.encode_completion(tokenizer, str(prompt), text, train_all, config.add_eos_token)

    def conversation(self, row: dict[str, Any]) -> Turns | None:
        """Return the row as turns for the template, or None for plain text."""
        column, template = self.columns.text, self.config.chat_template
        turns = self.turns(row[column])
        if self.columns.kind == "completion":
            prompt = self.prompt(row)
            if turns is None and template is None and isinstance(prompt, str):
                return None
            if turns is None:
                text = self.string(row, column, "empty completion")
                turns = [{"role": "assistant", "content": text}]
            turns = [*self.as_turns(prompt), *turns]
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
