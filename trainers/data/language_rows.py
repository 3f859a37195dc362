"""Rows of default, sft and mlm: a document each, or several pieces of one for mlm."""

from __future__ import annotations

from typing import Any

from trainers.data import chat
from trainers.data.chat import Turns
from trainers.data.labels import IGNORED
from trainers.data.row_reader import RowReader
from trainers.data.samples import Dropped, RowError, Sample


class LanguageRows(RowReader):
    """Encodes rows whose loss is on tokens of one text."""

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
