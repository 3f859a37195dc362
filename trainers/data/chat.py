"""Render a conversation as training needs it: its texts, and the parts that the loss sees.

One text is enough if each trained turn reads in it as it read when the model wrote it. Where a template
rewrites earlier turns (Qwen3 drops their reasoning), a conversation becomes one text for each trained turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from trainers.data.chat_template import ChatTemplate, Lost, Reading
from trainers.data.messages import Chat
from trainers.data.probes import TOOLS, is_reasoning
from trainers.data.samples import Dropped, RowError
from trainers.data.tokens import Span, Tokens
from trainers.data.turns import Turn, common, ended

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

History = Literal["auto", "unroll", "last", "keep"]
Unrendered = Literal["error", "drop"]
# Notes of a sample, which are counted.
UNROLLED = "unrolled: one sample for each trained turn"
LEFT_OUT = "the template leaves out the reasoning of earlier turns"
KEPT = "history: keep"


@dataclass
class Rendered:
    """A text, and what the loss sees of it."""

    text: str
    spans: list[Span]
    prompts: list[str] = field(default_factory=list)  # what the model is given at inference, for each span
    exact_end: bool = False  # whether spans end where the model stops
    notes: set[str] = field(default_factory=set)


class Renderer:
    """Renders conversations with the template of a tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens,
        history: History = "auto",
        unrendered: Unrendered = "error",
    ) -> None:
        self.tokenizer, self.tokens = tokenizer, tokens
        self.history, self.unrendered = history, unrendered
        self._templates: dict[bool, ChatTemplate] = {}

    def template(self, chat: Chat) -> ChatTemplate:
        """Return the template for a conversation: a tokenizer may have another one for tools."""
        key = bool(chat.tools)
        if key not in self._templates:
            source = self.tokenizer.get_chat_template(None, chat.tools)
            same = next((known for known in self._templates.values() if known.source == source), None)
            self._templates[key] = same or ChatTemplate(self.tokenizer, source)
        return self._templates[key]

    def everything(self, chat: Chat) -> Rendered:
        """Return the text of a conversation. The loss sees all of it.

        Raises:
            RowError: the template rejects the turns, or does not render a field.
        """
        template = self.template(chat)
        twin = self.history == "keep" and template.has_twin
        reading = self._accepted(template, chat, twin)
        notes: set[str] = set()
        if reading.lost:
            kept = {
                (number, name)
                for number, name in reading.lost
                if self._renders_alone(template, chat, number, name)
            }
            self._refuse(reading.lost - kept)
            notes = {LEFT_OUT} if kept else set()
        text = template.text(template.fitted(chat, twin), twin=twin)
        return Rendered(text, [(0, len(text))], exact_end=True, notes=notes | ({KEPT} if twin else set()))

    def _renders_alone(self, template: ChatTemplate, chat: Chat, number: int, name: str) -> bool:
        return (
            number != TOOLS
            and is_reasoning(name)
            and (number, name) not in template.reading(chat.until(number + 1)).lost
        )

    def trained(self, chat: Chat, turns: Sequence[int]) -> list[Rendered]:
        """Return texts in which the loss sees these turns, each as the model writes it at inference.

        Raises:
            RowError: the template rejects the turns, does not render a field, or a turn cannot be located.
        """
        turns = turns[-1:] if self.history == "last" else turns
        if not turns:
            return []
        found = self._texts(self.template(chat), chat, turns)
        for number, turn in enumerate(turns):
            self._check_content(chat, turn, found[number if len(found) > 1 else 0])
        return found

    def _texts(self, template: ChatTemplate, chat: Chat, turns: Sequence[int]) -> list[Rendered]:
        if self.history == "keep":
            return [self._kept(template, chat, turns)]
        if (len(turns) > 1 and self.history != "unroll") or turns[-1] < len(chat.messages) - 1:
            one = self._together(template, chat, turns)
            if one is not None and (self.history != "unroll" or len(turns) == 1):
                return [one]
        found, lost = [], []
        for turn in turns:
            rendered, missing = self._turn(template, chat.until(turn + 1), turn)
            found.append(rendered)
            lost.append((turn, missing))
        self._refuse_lost(chat, lost, {*turns})
        if len(turns) > 1:
            for rendered in found:
                rendered.notes.add(UNROLLED)
        return found

    def answer(self, chat: Chat, start: int) -> tuple[Rendered, int]:
        """Return the text of a conversation, and where its answer begins: the messages from `start` on.

        Raises:
            RowError: the template rejects the turns, does not render a field, or rewrites the prompt.
        """
        template = self.template(chat)
        rendered, missing = self._turn(template, chat, start, every=True)
        self._refuse_lost(chat, [(len(chat.messages) - 1, missing)], {*range(start, len(chat.messages))})
        for turn in range(start, len(chat.messages)):
            self._check_content(chat, turn, rendered)
        return rendered, rendered.spans[0][0]

    def _accepted(self, template: ChatTemplate, chat: Chat, twin: bool = False) -> Reading:
        reading = template.reading(chat, twin)
        if reading.error:
            template.text(chat, twin=twin)  # raises the error that these words cause, which says more
            raise RowError(reading.error)
        return reading

    def _together(
        self, template: ChatTemplate, given: Chat, turns: Sequence[int], twin: bool = False
    ) -> Rendered | None:
        """Return one text for all these turns; None if a turn does not read in it as at inference.

        With `twin`, the text is the training template's, in which turns read as they do there.
        """
        if self._accepted(template, given, twin).lost:
            return None
        asked = template.fitted(given)
        chat = template.fitted(given, True) if twin else asked
        text, blocks = template.text(chat, twin=twin), None
        if template.training is not None:
            marked, blocks = template.marked(template.fitted(given, True))
            if not marked.startswith(text):
                return None
            if marked != text:  # GLM ends a turn with the name of the next role
                text, chat, twin = marked, template.fitted(given, True), True
        spans: list[Span] = []
        prompts = []
        notes: set[str] = set()
        before = 0
        assistants = [n for n, m in enumerate(chat.messages) if m["role"] == "assistant" and n <= turns[-1]]
        for number in sorted({*assistants, *turns}):
            turn = Turn(template, chat, number, self.tokens.added, twin)
            last = number == len(chat.messages) - 1
            alone = text if last else template.text(chat.until(number + 1), twin=twin)
            if last and blocks is None and number in turns:
                text, notes = ended(turn, text, self.tokenizer.eos_token)
                alone = text
            shared = len(text) if last else common(alone, text)
            if number in turns:
                prompts.append(replace(turn, chat=asked).prompt())
                if blocks is not None and turn.is_assistant:
                    found = [(first, end) for first, end in blocks if before < end <= shared]
                else:
                    found = turn.span(text, prompts[-1], alone)
                if not found:
                    return None
                spans += found
            before = shared
        return Rendered(text, spans, prompts, exact_end=blocks is None, notes=notes)

    def _kept(self, template: ChatTemplate, chat: Chat, turns: Sequence[int]) -> Rendered:
        """Return one text that keeps the reasoning of all turns: TRL's training twin of the template."""
        twin = template.has_twin
        lost = self._accepted(template, chat, twin).lost
        self._refuse(lost)
        rendered = self._together(template, chat, turns, twin)
        if rendered is None:
            raise RowError(
                "history: this template rewrites earlier turns, and TRL has no training template that keeps "
                "them. Set history: auto."
            )
        rendered.notes.add(KEPT)
        return rendered

    def _turn(
        self, template: ChatTemplate, given: Chat, number: int, every: bool = False
    ) -> tuple[Rendered, Lost]:
        """Return the text of a conversation whose last message the loss sees, and what is lost.

        With `every`, the loss sees all messages from `number` on.
        """
        lost = self._accepted(template, given).lost
        turn = Turn(template, template.fitted(given), number, self.tokens.added)
        prompt = turn.prompt()
        own = {(place, name) for place, name in lost if place >= number}
        kept = template.reading(given, True) if own and template.has_twin else None
        if kept is not None and not kept.error and not own & kept.lost:
            text, lost = self._with_twin(template, given, turn, prompt), lost - own
        else:
            text = template.text(turn.chat)
        spans: list[Span] = []
        if template.training is not None:
            twin = template.fitted(given, True)
            marked, blocks = template.marked(twin)
            if marked.startswith(text):
                text = marked
            if turn.is_assistant and (not every or number == len(given.messages) - 1):
                shared = self._begins(replace(turn, chat=twin, twin=True), marked)
                moved = len(text) - len(marked)
                spans = [(first + moved, end + moved) for first, end in blocks if end > shared]
                if spans and text[spans[0][0] :] == marked[spans[0][0] - moved :]:
                    text, spans = turn.as_asked(text, spans, prompt)
                    if text.startswith(prompt):  # what it has of earlier turns is what inference sees of them
                        seen = template.reading(given.until(number)).lost if lost else lost
                        lost = frozenset(part for part in lost if part[0] >= number or part in seen)
                    if not every:
                        return Rendered(text, spans, [prompt]), lost
        notes: set[str] = set()
        if template.training is None:
            text, notes = ended(turn, text, self.tokenizer.eos_token)
        spans = turn.span(text, prompt, text)
        if not spans:
            raise RowError(
                "chat_template: this template changes earlier turns, so the assistant's turns cannot be "
                "located. Use another template; sft can also train on the complete text (train_on: all)."
            )
        return Rendered(text, spans, [prompt], exact_end=True, notes=notes), lost

    def _begins(self, turn: Turn, text: str) -> int:
        """Return a position in the turn, before all that differs between one answer and another.

        An answer may change how earlier turns are rendered: gpt-oss then leaves out the reasoning of a call.
        So the text is compared with that of another answer, and not with the text before the turn.
        """
        if not any(message["role"] == "assistant" for message in turn.chat.messages[: turn.number]):
            return 0
        return common(turn.template.text(turn.with_marks(), twin=True), text)

    def _with_twin(self, template: ChatTemplate, given: Chat, turn: Turn, prompt: str) -> str:
        """Return what inference sees, followed by the answer as the training template renders it.

        The template itself drops a part of every answer, such as its reasoning.
        """
        twin = template.fitted(given, True)
        marked = template.text(twin, twin=True)
        asked = template.text(twin.until(turn.number), prompt=True, twin=True)
        if marked.startswith(asked):
            return prompt + marked[len(asked) :]
        before = template.text(twin.until(turn.number), twin=True)
        if not marked.startswith(before):
            raise RowError("chat_template: the training template changes the prompt. Set history: keep.")
        return template.text(turn.chat.until(turn.number)) + marked[len(before) :]

    def _refuse_lost(self, chat: Chat, samples: list[tuple[int, Lost]], turns: set[int]) -> None:
        """Refuse fields that no sample renders.

        The reasoning of an earlier turn that is not trained is not seen at inference either.
        """
        gone = set()
        for number, name in {part for _, missing in samples for part in missing}:
            if number not in turns and number != TOOLS and is_reasoning(name):
                continue
            if all((number, name) in missing for turn, missing in samples if turn >= number):
                gone.add((number, name))
        self._refuse(gone)

    def _check_content(self, chat: Chat, turn: int, rendered: Rendered) -> None:
        """Refuse an answer that is not in its text as it is: a template may cut what looks like its marks."""
        content = chat.messages[turn].get("content")
        if (
            chat.messages[turn]["role"] != "assistant"
            or not isinstance(content, str)
            or "</think>" in content
        ):
            return
        if content.strip() not in rendered.text:
            self._refuse({(turn, "all of an answer (it changes its content)")})

    def _refuse(self, lost: Collection[tuple[int, str]]) -> None:
        """Raise an error that names the fields, or drop the row.

        Raises:
            RowError, Dropped: a field is lost.
        """
        if not lost:
            return
        names = ", ".join(sorted({name for _, name in lost}))
        if self.unrendered == "drop":
            raise Dropped(f"not rendered by the template: {names}")
        raise RowError(
            f"chat_template: this template does not render {names}, so the model would never see it. Use a "
            "template that does, remove it from the rows, or set unrendered: drop (drops such rows)."
        )
