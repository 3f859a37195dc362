"""Render conversations with a chat template, and find out what it does with each field of a message.

A template is a program written by the author of a model. Which fields it reads, in which form it wants them,
and which it drops without a word is found by rendering words that are unique (probes.py), once for
each shape of a conversation.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from trainers.data.messages import Chat, Message, object_or_text
from trainers.data.probes import Probe, Shape, probe_of, shape_of
from trainers.data.samples import RowError
from trainers.data.tokens import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Lost = frozenset[tuple[int, str]]  # fields: the number of the message (TOOLS for tools), and the name


@dataclass(frozen=True)
class Form:
    """How a template wants the content and the arguments of a call."""

    content: Literal["given", "text", "parts"] = "given"
    arguments: Literal["given", "object", "text"] = "given"
    empty: bool = False  # "" where there is no content
    wrapped: bool = False  # each tool as {"type": "function", "function": tool}


# The forms are tried in this order; the first in which nothing is lost is taken.
FORMS = tuple(
    Form(content, arguments, empty, wrapped)
    for wrapped in (False, True)
    for content in ("given", "text", "parts")
    for empty in (False, True)
    for arguments in ("given", "object", "text")
)


@dataclass(frozen=True)
class Reading:
    """What a template does with the conversations of a shape."""

    form: Form
    lost: Lost = frozenset()
    error: str = ""


class ChatTemplate:
    """A chat template, with what it needs of its tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.source = source
        self.special = dict(tokenizer.special_tokens_map)
        self.training = _training(tokenizer, source)  # with {% generation %} markers, or None
        self._readings: dict[tuple[Shape, bool], Reading] = {}

    @property
    def has_twin(self) -> bool:
        """Whether a training twin may render what the template drops."""
        return self.training is not None and self.training != self.source

    def text(self, chat: Chat, prompt: bool = False, twin: bool = False) -> str:
        """Return the text of a conversation. With `prompt`, it ends where the assistant must answer.

        Raises:
            RowError: the template rejects these turns.
        """
        return self._render(chat, prompt, twin, mark=False)[0]

    def marked(self, chat: Chat) -> tuple[str, list[Span]]:
        """Return the text of a conversation with the training template, and the spans that it marks."""
        text, spans = self._render(chat, False, True, mark=True)
        return text, [(first, last) for first, last in spans if first < last]

    def fitted(self, chat: Chat, twin: bool = False) -> Chat:
        """Return the conversation in the form that the template (or the training template) renders."""
        return _fitted(chat, self.reading(chat, twin).form)

    def reading(self, chat: Chat, twin: bool = False) -> Reading:
        """Return what the template (or the training template) does with conversations of this shape."""
        shape = shape_of(chat)
        known = self._readings.get((shape, twin))
        if known is None:
            known = self._readings[shape, twin] = self._read(probe_of(chat), twin)
        return known

    def _read(self, probe: Probe, twin: bool) -> Reading:
        best: Reading | None = None
        tried: list[Chat] = []
        for form in FORMS:
            chat = _fitted(probe.chat, form)
            if chat in tried:
                continue
            tried.append(chat)
            found, text = self._try(probe, form, twin)
            if not found.error and not found.lost:
                # A template may take text and mean an object: it then writes an object in another way.
                other, text_of_object = self._try(probe, replace(form, arguments="object"), twin)
                same = other.error or other.lost or text_of_object == text
                return found if same else other
            if best is None or (bool(found.error), len(found.lost)) < (bool(best.error), len(best.lost)):
                best = found
        assert best is not None
        return best

    def _try(self, probe: Probe, form: Form, twin: bool) -> tuple[Reading, str]:
        try:
            text, _ = self._render(_fitted(probe.chat, form), False, twin, False)
        except RowError as error:
            return Reading(form, error=str(error)), ""
        return Reading(form, probe.lost(text, self.source)), text

    def _render(self, chat: Chat, prompt: bool, twin: bool, mark: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.training if twin else self.source
        render: Any = render_jinja_template  # its types say one text, but it returns texts and spans
        try:
            texts, spans = render(
                [chat.messages],
                tools=chat.tools,
                chat_template=source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=mark,
                **{**self.special, **chat.options},
            )
        except Exception as error:
            # A template is a program written by the model's author. It may raise any exception.
            roles = ", ".join(turn["role"] for turn in chat.messages)
            raise RowError(f"chat_template: the template rejects the turns ({roles}): {error}") from error
        return texts[0], (spans[0] if mark else [])


def training_templates(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Return the training template of each template of a tokenizer, or None. TRL may change them."""
    own = tokenizer.chat_template or {}
    sources = own if isinstance(own, dict) else {"default": own}
    return [_training(tokenizer, source) for _, source in sorted(sources.items())]


def _training(tokenizer: PreTrainedTokenizerBase, source: str) -> str | None:
    """Return the template with markers for what the loss sees: itself, or TRL's training twin."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(source):
        return source
    own = copy.copy(tokenizer)
    own.chat_template = source
    try:
        return get_training_chat_template(own)
    except Exception:
        # TRL has no twin, or its probes make the template raise an exception.
        return None


def _fitted(chat: Chat, form: Form) -> Chat:
    messages = [_in_form(message, form) for message in chat.messages]
    tools = chat.tools
    if tools and form.wrapped:
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return Chat(messages, tools, chat.options, chat.ignored)


def _in_form(message: Message, form: Form) -> Message:
    content, calls = message.get("content"), message.get("tool_calls")
    changed: Message = {}
    if content is None and form.empty:
        changed["content"] = content = ""
    if isinstance(content, dict) and form.content != "given":
        changed["content"] = content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, str) and form.content == "parts":
        changed["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, list) and form.content == "text":
        changed["content"] = "".join(part["text"] for part in content)
    if calls and form.arguments != "given":
        changed["tool_calls"] = [_in_form_call(call, form.arguments) for call in calls]
    return {**message, **changed} if changed else message


def _in_form_call(call: dict[str, Any], form: str) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if form == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif form == "object" and isinstance(arguments, str):
        arguments = object_or_text(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}
