"""Encode rows of reward, dpo, orpo and kto: a prompt and its answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainers.config.errors import ConfigError
from trainers.data.labels import IGNORED
from trainers.data.messages import Chat, Message, Turns, has_substance
from trainers.data.row_reader import RowReader
from trainers.data.samples import Dropped, RowError, Sample
from trainers.data.tokens import Encoded


@dataclass
class PreferenceRows(RowReader):
    """An encoder for rows that say which answer is better, or whether an answer is wanted."""

    notes: set[str] = field(default_factory=set)  # of the row that is read

    def preferred(self, row: dict[str, Any]) -> list[Sample]:
        """Return the sample of a row for dpo and orpo: the end of the prompt, the start of both answers."""
        prompt, chosen, rejected = self.pair(row)
        if not prompt:
            raise RowError(f"{self.config.trainer} needs a prompt. Set prompt_text_column, or give messages.")
        kept = self.fit(prompt, chosen, rejected)
        length = len(prompt) + max(len(chosen), len(rejected))
        tokens = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), kept, strict=True))
        cut = sum(map(len, kept)) < len(prompt) + len(chosen) + len(rejected)
        return [Sample(tokens, length, len(kept[1]) + len(kept[2]), cut, notes=self.taken_notes())]

    def compared(self, row: dict[str, Any]) -> list[Sample]:
        """Return the sample of a row for reward: two complete texts.

        A pair that is too long is dropped. If it were cut, it would mean something else.
        """
        prompt, chosen, rejected = self.pair(row)
        length = len(prompt) + max(len(chosen), len(rejected))
        if length > self.config.sequence_length:
            raise Dropped("longer than block_size")
        tokens = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        supervised = 2 * len(prompt) + len(chosen) + len(rejected)
        return [Sample(tokens, length, supervised, notes=self.taken_notes())]

    def wanted(self, row: dict[str, Any]) -> list[Sample]:
        """Return the samples of a row for kto: a completion with its label.

        A pair becomes two samples: a wanted and an unwanted completion.
        """
        if self.columns.kind == "pair":
            prompt, chosen, rejected = self.pair(row)
            answers = [(chosen, True), (rejected, False)]
        else:
            prompt, ids = self.labelled(row)
            answers = [(ids, self.label(row))]
        if not prompt:
            raise RowError("kto needs a prompt. Set prompt_text_column, or give messages.")
        samples = []
        kept_prompt, *cut_answers = self.fit(prompt, *(ids for ids, _ in answers))
        for (ids, label), kept in zip(answers, cut_answers, strict=True):
            tokens = {"prompt_ids": kept_prompt, "completion_ids": kept, "label": label}
            cut = len(kept_prompt) + len(kept) < len(prompt) + len(ids)
            samples.append(Sample(tokens, len(prompt) + len(ids), len(kept), cut, notes=self.taken_notes()))
        return samples

    def pair(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
        """Return the ids of the prompt, of the chosen answer and of the rejected answer."""
        columns, self.notes = self.columns, set()
        assert columns.rejected is not None
        chosen, rejected = self.whole(row, columns.text), self.whole(row, columns.rejected)
        for name, turns in ((columns.text, chosen), (columns.rejected, rejected)):
            if turns is None:
                self.string(row, name, "empty completion")
        if chosen is not None and rejected is not None:
            both = self.conversation_pair(row, chosen, rejected)
        elif chosen is None and rejected is None:
            both = self.text(row, columns.text), self.text(row, columns.rejected)
        else:
            raise RowError(f"'{columns.text}' and '{columns.rejected}' must both be text or both messages.")
        (one, cut), (other, other_cut) = both
        # A cut inside a token would give the two answers different prompts.
        cut = min(cut, other_cut)
        while one[:cut] != other[:cut]:
            cut -= 1
        if one[cut:] == other[cut:]:
            raise Dropped("chosen equals rejected")
        return one[:cut], one[cut:], other[cut:]

    def conversation_pair(
        self, row: dict[str, Any], chosen: Turns, rejected: Turns
    ) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
        """Return the ids of both conversations, and where their answers begin: at the first difference."""
        one, other = (
            self.joined(row, self.columns.text, chosen),
            self.joined(row, self.columns.rejected, rejected),
        )
        start = next(
            (
                number
                for number, (a, b) in enumerate(zip(one.messages, other.messages, strict=False))
                if a != b
            ),
            min(len(one.messages), len(other.messages)),
        )
        if one.messages == other.messages:
            raise Dropped("chosen equals rejected")
        for chat in (one, other):
            if start >= len(chat.messages) or chat.messages[start]["role"] != "assistant":
                raise Dropped("chosen and rejected differ before their last turn")
        return self.split(one, start), self.split(other, start)

    def labelled(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt and of the completion, which is the last turn of messages."""
        self.notes = set()
        turns = self.whole(row, self.columns.text)
        if turns is None:
            ids, cut = self.text(row, self.columns.text)
        else:
            chat = self.joined(row, self.columns.text, turns)
            ids, cut = self.split(chat, len(chat.messages) - 1)
        return ids[:cut], ids[cut:]

    def whole(self, row: dict[str, Any], column: str) -> Turns | None:
        """Return the messages of a column. An answer is compared as a whole: no turn is taken out."""
        turns, ignored = self.turns(row, column)
        if ignored:
            self.notes.add("weight and train of a message have no effect on an answer")
        return turns

    def joined(self, row: dict[str, Any], column: str | None, turns: Turns) -> Chat:
        """Return a conversation that ends with an answer, with the prompt of the row in front of it."""
        if turns[-1]["role"] != "assistant":
            raise RowError(f"the last turn of '{column}' must be the assistant's, not {turns[-1]['role']}'s.")
        if not has_substance(turns[-1]):
            raise Dropped("empty completion")
        self.need_template()
        if turns[0]["role"] == "assistant":
            prompt = self.prompt(row)
            if prompt is None:
                raise RowError(
                    f"column '{column}' contains only an answer. Add the turns before it, or name the "
                    "column of the prompt (prompt_text_column)."
                )
            turns = [*self.as_turns(prompt), *turns]
        elif self.columns.prompt in self.columns.messages:
            before = self.whole(row, str(self.columns.prompt))
            if before is not None and turns[: len(before)] != before:
                turns = [*before, *turns]
        elif self.columns.prompt is not None and self.system(row) is None:
            text = row[self.columns.prompt]
            if isinstance(text, str) and text.strip() and text.strip() not in map(_text, turns):
                self.notes.add("the prompt column is not used: the answers are complete conversations")
        return self.chat(row, turns)

    def split(self, chat: Chat, start: int) -> tuple[list[int], int]:
        """Return the ids of a conversation, and the number of the first one of its answer."""
        rendered, cut = self.renderer.answer(chat, start)
        text = rendered.text[: rendered.spans[-1][1]]
        found = self.tokens.rendered(text, [(cut, len(text))], rendered.prompts, exact_end=True)
        self.notes |= rendered.notes | found.notes
        return found.input_ids, _first_label(found)

    def text(self, row: dict[str, Any], column: str) -> tuple[list[int], int]:
        """Return the ids of a prompt with its answer as text, and where the answer begins."""
        prompt, text = self.prompt(row), self.string(row, column, "empty completion")
        if column in self.columns.dialogues and self.config.kind.prompted:
            end = text.rfind("\n\nAssistant:") + len("\n\nAssistant:")
            prompt, text = text[:end], text[end:]
        if self.config.chat_template is not None and prompt is not None:
            before = self.as_turns(prompt)
            chat = self.chat(row, [*before, {"role": "assistant", "content": text}])
            return self.split(chat, len(chat.messages) - 1)
        if self.config.chat_template is not None:
            raise RowError(
                f"chat_template: {self.config.chat_template} needs messages or a prompt column, and "
                f"'{column}' has only plain text. Set chat_template: null, or prompt_text_column."
            )
        if prompt is not None and not isinstance(prompt, str):
            self.need_template()
        eos = self.config.add_eos_token
        if prompt is None:  # reward: the complete text is in one column
            return self.tokens.joined("", text, eos, everything=True).input_ids, 0
        found = self.tokens.joined(str(prompt), text, eos)
        self.notes |= found.notes | self.unused(row)
        return found.input_ids, _first_label(found)

    def taken_notes(self) -> list[str]:
        """Return the notes of the row that was just read, and forget them."""
        found, self.notes = sorted(self.notes), set()
        return found

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


def _text(message: Message) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _first_label(encoded: Encoded) -> int:
    """Return the number of the first token that the loss sees."""
    return next((n for n, label in enumerate(encoded.labels) if label != IGNORED), len(encoded.labels))


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
