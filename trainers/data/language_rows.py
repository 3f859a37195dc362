"""Encode rows of default, sft and mlm: one sample per row, or several for mlm."""

from __future__ import annotations

from typing import Any

from trainers.data.chat import Rendered
from trainers.data.labels import IGNORED
from trainers.data.messages import Chat, has_substance
from trainers.data.row_reader import RowReader
from trainers.data.samples import Dropped, RowError, Sample
from trainers.data.tokens import Encoded


class LanguageRows(RowReader):
    """An encoder for rows whose loss is on the tokens of one text."""

    def language(self, row: dict[str, Any]) -> list[Sample]:
        """Return the samples of a row for default and sft: one, or one for each trained turn (chat.py)."""
        found = [self.tokenized(row)] if self.columns.kind == "tokens" else self.documents(row)
        return [self.sample(encoded) for encoded in found or [Encoded([], [])]]

    def sample(self, encoded: Encoded) -> Sample:
        limit = None if self.config.packed == "wrapped" else self.config.sequence_length
        labels = encoded.labels[:limit]
        # Nothing precedes the first token of a sequence, so the loss never sees it.
        supervised = sum(label != IGNORED for label in labels[1:])
        length = len(encoded.input_ids)
        cut = limit is not None and length > limit
        if not supervised:
            return Sample(self.empty, length, 0, cut, "no trained token")
        tokens = {"input_ids": encoded.input_ids[:limit], "labels": labels}
        return Sample(tokens, length, supervised, cut, notes=sorted(encoded.notes))

    def masked(self, row: dict[str, Any]) -> list[Sample]:
        """Return the samples of a row for mlm. A row longer than block_size becomes several samples."""
        notes: set[str] = set()
        if self.columns.kind == "tokens":
            ids, size = self.tokenized(row).input_ids, self.config.sequence_length
            parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        else:
            text, notes = self.plain(row)
            parts = self.tokenizer(
                text,
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
        return [
            Sample({"input_ids": part}, len(part), count, notes=sorted(notes))
            for part, count in counted
            if count
        ]

    def plain(self, row: dict[str, Any]) -> tuple[str, set[str]]:
        """Return a row as one text, rendered with the template if there is one, and notes about it."""
        found = self.conversation(row)
        if found is not None:
            rendered = self.renderer.everything(found[0])
            return rendered.text, rendered.notes
        if self.columns.kind == "text":
            return self.string(row, self.columns.text, "empty text"), self.unused(row)
        text = f"{self.prompt(row)}{self.string(row, self.columns.text, 'empty completion')}"
        return text, self.unused(row)

    def tokenized(self, row: dict[str, Any]) -> Encoded:
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
        return Encoded([ids[index] for index in kept], [labels[index] for index in kept])

    def documents(self, row: dict[str, Any]) -> list[Encoded]:
        """Return the ids and labels of a row with text or messages."""
        config = self.config
        found = self.conversation(row)
        if found is not None:
            return self.conversations(*found)
        if self.columns.kind == "text":
            text = self.string(row, self.columns.text, "empty text")
            if config.train_on in ("completion", "last"):
                raise RowError(
                    f"train_on: {config.train_on} needs rows with a separate completion, and column "
                    f"'{self.columns.text}' has plain text. Set train_on: auto, or name a prompt_text_column."
                )
            encoded = self.tokens.joined("", text, config.add_eos_token, everything=True)
            encoded.notes |= self.unused(row)
            return [encoded]
        prompt, text = self.prompt(row), self.string(row, self.columns.text, "empty completion")
        encoded = self.tokens.joined(str(prompt), text, config.add_eos_token, config.trains_on_all)
        encoded.notes |= self.unused(row)
        return [encoded]

    def conversations(self, chat: Chat, start: int) -> list[Encoded]:
        """Return the samples of a conversation. The turns before `start` are its prompt."""
        if self.config.trains_on_all:
            return [self.encoded(self.renderer.everything(chat))]
        turns = [
            number
            for number, message in enumerate(chat.messages)
            if number >= start
            and message["role"] in self.config.roles_to_train
            and number not in chat.ignored
        ]
        if self.config.train_on == "last":
            turns = turns[-1:]
        return [self.encoded(rendered) for rendered in self.renderer.trained(chat, turns)]

    def encoded(self, rendered: Rendered) -> Encoded:
        found = self.tokens.rendered(rendered.text, rendered.spans, rendered.prompts, rendered.exact_end)
        found.notes |= rendered.notes
        return found

    def conversation(self, row: dict[str, Any]) -> tuple[Chat, int] | None:
        """Return the row as a conversation, and the number of its first answer; None for plain text."""
        column, template = self.columns.text, self.config.chat_template
        turns, ignored = self.turns(row, column)
        start = 0
        if self.columns.kind == "completion":
            prompt = self.prompt(row)
            if turns is None and template is None and isinstance(prompt, str):
                return None
            if turns is None:
                text = self.string(row, column, "empty completion")
                turns = [{"role": "assistant", "content": text}]
            before = self.as_turns(prompt)
            start, turns = len(before), [*before, *turns]
            ignored = frozenset(number + start for number in ignored)
        elif turns is None and template is None:
            return None
        elif turns is None:
            self.string(row, column, "empty text")
            raise RowError(
                f"chat_template: {template} needs messages, and column '{column}' has plain text. Set "
                "chat_template: null."
            )
        chat = self.chat(row, turns, ignored)
        start += len(chat.messages) - len(turns) if start else 0
        answers = [message for message in chat.messages[start:] if message["role"] == "assistant"]
        if answers and not any(map(has_substance, answers)):
            raise Dropped("empty completion")
        return chat, start
