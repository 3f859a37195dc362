"""Find the characters of a turn in a rendered conversation, for a template that does not mark them itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from trainers.data.chat_template import ChatTemplate
from trainers.data.messages import Chat
from trainers.data.samples import RowError
from trainers.data.tokens import Span

ENDED = "EOS is added, since the template does not end a turn"  # a note, which is counted
MARK = "\u2063"  # an invisible separator: in front of a text, it shows where the template puts it
_UNMARKED = ("role", "type", "id", "tool_call_id", "arguments")  # what a template compares or parses
NEAR = 64  # no added token is longer, in characters


@dataclass(frozen=True)
class Turn:
    """A message of a conversation: where to look for it."""

    template: ChatTemplate
    chat: Chat  # in the form that the template wants
    number: int
    added: re.Pattern[str]  # the tokens that were added to the vocabulary
    twin: bool = False

    @property
    def is_assistant(self) -> bool:
        return bool(self.chat.messages[self.number]["role"] == "assistant")

    def prompt(self) -> str:
        """Return what the model is given before it writes the turn."""
        return self.template.text(self.chat.until(self.number), prompt=True) if self.number else ""

    def as_asked(self, text: str, spans: list[Span], prompt: str) -> tuple[str, list[Span]]:
        """Return the text with what the model is given at inference in front of its last turn, and the spans.

        gpt-oss shows the reasoning of a call until the answer is there, and leaves it out afterwards.
        """
        before = self.template.text(self.chat.until(self.number)) if self.number else ""
        if text.startswith(prompt) or not prompt.startswith(before):
            return text, spans
        header, start = prompt[len(before) :], spans[0][0]
        if not header or not text.startswith(header, start):
            return text, spans
        moved = len(before) - start
        return before + text[start:], [(first + moved, end + moved) for first, end in spans]

    def span(self, text: str, prompt: str, alone: str) -> list[Span]:
        """Return the span of the turn in the text, or [] if it does not read as in `alone`.

        `alone` is the text of the conversation up to the turn.
        """
        start = self._start(text, prompt)
        stop = None if start is None else self._stop(text, start, alone)
        return [] if start is None or stop is None or stop <= start else [(start, stop)]

    def _start(self, text: str, prompt: str) -> int | None:
        if self.number and self.is_assistant and text.startswith(prompt):
            return len(prompt)
        if not self.number or not self.is_assistant:
            return self._content(text)
        before = self.template.text(self.chat.until(self.number), twin=self.twin)
        # The template answers otherwise than it asks: the turn begins after what both share.
        shared = self._outside(text, common(before, text), 0)
        if self.added.sub("", before[shared:]).strip():
            return None
        return max(shared, self._outside(text, common(prompt, text), 0))

    def _content(self, text: str) -> int | None:
        """Return where the content of the turn begins, or None if it is not in the text."""
        if not isinstance(self.chat.messages[self.number].get("content"), str):
            return None
        probe = self.template.text(self.with_marks("content"), twin=self.twin)
        place = probe.find(MARK)
        return place if place >= 0 and text.startswith(probe[:place]) else None

    def with_marks(self, only: str | None = None) -> Chat:
        """Return the conversation with MARK in front of each text of the turn, or only of one key."""
        turns = list(self.chat.messages)
        given = turns[self.number]
        turns[self.number] = {**given, **_marked({only: given[only]} if only else given)}
        return replace(self.chat, messages=turns)

    def _stop(self, text: str, start: int, alone: str) -> int | None:
        """Return the end of the turn: after the last token that was added to the vocabulary.

        The model never writes what the template has after it, such as a newline. None if the turn is not
        complete.
        """
        shared = common(alone, text)
        end = self._outside(text, shared, start)
        complete = shared == len(alone)
        if not complete and self.added.sub("", alone[end:]).strip():
            return None  # a part of the turn is elsewhere in the text
        last = None
        for last in self.added.finditer(text, start, end):  # noqa: B007
            pass
        if last is not None and not text[last.end() : end].strip():
            return last.end()
        # Where nothing else ends a turn, the model stops with the token that the next turn begins with.
        following = self.added.match(text, end)
        return None if not complete else following.end() if following else end

    def _outside(self, text: str, position: int, start: int) -> int:
        """Return a position that is not inside a token which was added to the vocabulary."""
        for found in self.added.finditer(text, max(start, position - NEAR), position + NEAR):
            if found.start() < position < found.end():
                return found.start()
        return position


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: part if key in _UNMARKED else _marked(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_marked(part) for part in value]
    return MARK + value if isinstance(value, str) else value


def ended(turn: Turn, text: str, eos: str | None) -> tuple[str, set[str]]:
    """Return a text that ends with an answer, followed by a token that ends the turn, and notes.

    A template that writes no such token ends a turn with the first token of the next one. If that is plain
    text, EOS is added.
    """
    length = len(text.rstrip())
    if any(found.end() == length for found in turn.added.finditer(text, max(0, length - NEAR))):
        return text, set()
    following = _following(turn)
    if following is not None:
        return text + following, set()
    return (f"{text}{eos}", {ENDED}) if eos else (text, set())


def _following(turn: Turn) -> str | None:
    """Return the added token with which the turn after an answer begins, if it begins with one."""
    calls = turn.chat.messages[-1].get("tool_calls")
    answer = {"role": "assistant", "content": "!", **({"tool_calls": calls} if calls else {})}
    result = [{"role": "tool", "content": "!"}] if calls else []
    for after in (*result, {"role": "user", "content": "?"}):
        try:
            chat = turn.template.fitted(Chat([{"role": "user", "content": "?"}, answer, after]))
            text, longer = turn.template.text(chat.until(2)), turn.template.text(chat)
        except RowError:
            continue
        if longer.startswith(text) and (found := turn.added.match(longer, len(text))):
            return found.group()
    return None


def common(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low + 1 < high:  # the texts agree up to `low`, and differ before `high`
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
