"""Find the fields of a message that a template does not render, with words that are unique."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from trainers.data.messages import REASONING_KEYS, Chat, Message, object_or_text

Shape = tuple[Any, ...]
# Keys that only connect a call with its result. Many templates leave them out, and lose nothing.
LINKS = frozenset({"role", "id", "type", "index", "tool_call_id"})
TOOLS = -1  # where the number of a message would be
THOUGHT = "the reasoning in content (before </think>)"


@dataclass
class Probe:
    """A conversation of a given shape, made of unique words."""

    chat: Chat
    words: list[tuple[str, int, str]]  # word, number of its message, its field

    def lost(self, text: str, source: str) -> frozenset[tuple[int, str]]:
        """Return the fields whose words are not in the text, or are there in a form that no model reads."""
        lost = {(number, name) for word, number, name in self.words if word not in text}
        # A template that does not expect an object, or that expects one, may write Python or escaped JSON.
        lost |= {(number, name) for word, number, name in self.words if f"{{'{word}':" in text}
        lost |= {(number, name) for word, number, name in self.words if f'\\"{word}\\"' in text}
        lost |= {
            (number, name)
            for word, number, name in self.words
            if re.search(r"""['"]text['"]: ?['"]""" + word, text)
        }
        for number, message in enumerate(self.chat.messages):
            for name, value in message.items():
                if not isinstance(value, (str, list, dict)) and name not in LINKS and name not in source:
                    lost.add((number, name))
        return frozenset(lost)


def shape_of(chat: Chat) -> Shape:
    """Return what decides how a template treats a conversation, apart from the words in it."""
    options = tuple((key, repr(value)) for key, value in sorted(chat.options.items()))
    return (
        is_flat(chat.tools) if chat.tools else None,
        options,
        *(_shape(message) for message in chat.messages),
    )


def _shape(message: Message) -> Shape:
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str):
        return (message["role"], _kind(content))
    calls = message.get("tool_calls") or ()
    others = tuple(
        (key, bool(value), type(value).__name__)
        for key, value in sorted(message.items())
        if key not in ("role", "content", "tool_calls")
    )
    return (
        message["role"],
        _kind(content),
        tuple(_arguments(call["function"]["arguments"]) for call in calls),
        others,
    )


def _arguments(arguments: Any) -> Any:
    if isinstance(arguments, str):
        return "json" if isinstance(object_or_text(arguments), dict) else "text"
    return bool(arguments)


def _kind(content: Any) -> Any:
    if isinstance(content, str):
        return "thought" if "</think>" in content else bool(content.strip())
    return (type(content).__name__, len(content)) if content is not None else None


class _Words:
    """A source of unique words."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, str]] = []

    def new(self, number: int, name: str) -> str:
        word = f"zq{len(self.found)}xw"
        self.found.append((word, number, name))
        return word


def probe_of(chat: Chat) -> Probe:
    """Return a conversation of the same shape, made of unique words."""
    words = _Words()
    messages = [_probe(message, number, words) for number, message in enumerate(chat.messages)]
    tools = [_tool(words, is_flat(chat.tools))] if chat.tools else None
    return Probe(Chat(messages, tools, chat.options), words.found)


def _probe(message: Message, number: int, words: _Words) -> Message:
    found: Message = {}
    for name, value in message.items():
        if name in LINKS:
            found[name] = value
        elif name == "content":
            found[name] = _content(message["role"], value, number, words)
        elif name == "tool_calls":
            found[name] = [_call(call, number, words) for call in value]
        elif name == "name" and message["role"] == "tool":
            found[name] = value  # the call has it already
        elif isinstance(value, str):
            found[name] = words.new(number, name) if value.strip() else value
        elif isinstance(value, (list, dict)):
            found[name] = (
                [words.new(number, name)] if isinstance(value, list) else {"a": words.new(number, name)}
            )
        else:
            found[name] = value
    return found


def _content(role: str, value: Any, number: int, words: _Words) -> Any:
    name = "content"
    if isinstance(value, dict):
        return {words.new(number, name): words.new(number, name)} if value else value
    if isinstance(value, list):
        return [{"type": "text", "text": words.new(number, name)} for _ in value]
    if not isinstance(value, str) or not value.strip():
        return value
    if role == "assistant" and "</think>" in value:
        thought, _, rest = value.partition("</think>")
        before = words.new(number, THOUGHT) if thought.replace("<think>", "").strip() else ""
        start = "<think>\n" if "<think>" in thought else ""
        return f"{start}{before}\n</think>\n\n{words.new(number, name) if rest.strip() else ''}"
    return words.new(number, name)


def _call(call: dict[str, Any], number: int, words: _Words) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    name = "tool_calls (arguments)"
    kind = _arguments(arguments)
    probed = arguments
    if kind == "text":
        probed = words.new(number, name)
    elif kind:
        probed = {words.new(number, name): words.new(number, name)}
    if kind == "json":
        probed = json.dumps(probed)
    return {**call, "function": {**function, "name": words.new(number, "tool_calls"), "arguments": probed}}


def is_flat(tools: list[dict[str, Any]]) -> bool:
    """Return whether a tool is only the inner part of OpenAI's form."""
    return any("function" not in tool for tool in tools)


def _tool(words: _Words, flat: bool) -> dict[str, Any]:
    argument = words.new(TOOLS, "tools")
    function = {
        "name": words.new(TOOLS, "tools"),
        "description": words.new(TOOLS, "tools"),
        "parameters": {
            "type": "object",
            "properties": {argument: {"type": "string", "description": words.new(TOOLS, "tools")}},
            "required": [argument],
        },
    }
    return function if flat else {"type": "function", "function": function}


def is_reasoning(name: str) -> bool:
    """Return whether a field has what the model thinks before it answers."""
    return name in REASONING_KEYS or name == THOUGHT
