"""Encode rows of reward, dpo, orpo and kto: a prompt and its answers."""

from __future__ import annotations

from typing import Any

from trainers.config.errors import ConfigError
from trainers.data import chat
from trainers.data.row_reader import RowReader
from trainers.data.samples import Dropped, RowError, Sample


class PreferenceRows(RowReader):
    """An encoder for rows that say which answer is better, or whether an answer is wanted."""

    def preferred(self, row: dict[str, Any]) -> list[Sample]:
        """Return the sample of a row for dpo and orpo: the end of the prompt, the start of both answers."""
        prompt, chosen, rejected = self.pair(row)
        if not prompt:
            raise RowError(f"{self.config.trainer} needs a prompt. Set prompt_text_column, or give messages.")
        kept = self.fit(prompt, chosen, rejected)
        length = len(prompt) + max(len(chosen), len(rejected))
        tokens = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), kept, strict=True))
        cut = sum(map(len, kept)) < len(prompt) + len(chosen) + len(rejected)
        return [Sample(tokens, length, len(kept[1]) + len(kept[2]), cut)]

    def compared(self, row: dict[str, Any]) -> list[Sample]:
        """Return the sample of a row for reward: two complete texts.

        A pair that is too long is dropped. If it were cut, it would mean something else.
        """
        prompt, chosen, rejected = self.pair(row)
        length = len(prompt) + max(len(chosen), len(rejected))
        if length > self.config.sequence_length:
            raise Dropped("longer than block_size")
        tokens = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        return [Sample(tokens, length, 2 * len(prompt) + len(chosen) + len(rejected))]

    def wanted(self, row: dict[str, Any]) -> list[Sample]:
        """Return the samples of a row for kto: a completion with its label.

        A pair becomes two samples: a wanted and an unwanted completion.
        """
        if self.columns.kind == "pair":
            prompt, chosen, rejected = self.pair(row)
            answers = [(chosen, True), (rejected, False)]
        else:
            prompt, ids = self.answer(row, self.columns.text)
            answers = [(ids, self.label(row))]
        if not prompt:
            raise RowError("kto needs a prompt. Set prompt_text_column, or give messages.")
        samples = []
        kept_prompt, *cut_answers = self.fit(prompt, *(ids for ids, _ in answers))
        for (ids, label), kept in zip(answers, cut_answers, strict=True):
            tokens = {"prompt_ids": kept_prompt, "completion_ids": kept, "label": label}
            cut = len(kept_prompt) + len(kept) < len(prompt) + len(ids)
            samples.append(Sample(tokens, len(prompt) + len(ids), len(kept), cut))
        return samples

    def pair(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
        """Return the ids of the prompt, of the chosen answer and of the rejected answer."""
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
        """Return the ids of the prompt and of the answer in `column`.

        In messages, the last turn is the answer, and the turns before it are its prompt.
        """
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
                        f"column '{column}' contains only an answer. Add the turns before it, or name the "
                        "column of the prompt (prompt_text_column)."
                    )
                before = self.as_turns(prompt)
            return chat.encode_answer(self.tokenizer, before, turns[-1]["content"])
        prompt, text = self.prompt(row), self.string(row, column, "empty completion")
        if self.config.chat_template is not None and prompt is not None:
            return chat.encode_answer(self.tokenizer, self.as_turns(prompt), text)
        if self.config.chat_template is not None:
            raise RowError(
                f"chat_template: {self.config.chat_template} needs messages or a prompt column, and "
                f"'{column}' has only plain text. Set chat_template: null, or prompt_text_column."
            )
        if prompt is not None and not isinstance(prompt, str):
            self.need_template()
        eos = self.config.add_eos_token
        if prompt is None:  # reward: the complete text is in one column
            return [], chat.encode_text(self.tokenizer, text, eos).input_ids
        before_ids = chat.encode_text(self.tokenizer, str(prompt), eos=False).input_ids
        full = chat.encode_completion(self.tokenizer, str(prompt), text, False, eos)
        return before_ids, full.input_ids[len(before_ids) :]

    def fit(self, prompt: list[int], *answers: list[int]) -> tuple[list[int], ...]:
        """Cut the prompt at its start and the answers at their end, to the lengths in the config.

        Raises:
            Dropped: nothing is left to learn from.
        """
        block = self.config.sequence_length
        prompt = prompt[-min(self.config.max_prompt_length, block) :]
        room = min(block - len(prompt), self.config.max_completion_length or block)
        if room < 1:
            raise Dropped("the prompt leaves no room for a completion")
        cut = [answer[:room] for answer in answers]
        if len(cut) == 2 and cut[0] == cut[1]:
            raise Dropped("chosen equals rejected after the cut")
        return (prompt, *cut)


def check_label_balance(labels: list[bool]) -> None:
    """Check that kto has wanted and unwanted completions. It learns nothing from one kind only.

    Raises:
        ConfigError: all labels are the same.
    """
    if len(set(labels)) < 2:
        raise ConfigError(
            f"data.column_mapping.label_column: all {len(labels)} samples have the label {labels[0]}. kto "
            "needs both wanted and unwanted completions."
        )
