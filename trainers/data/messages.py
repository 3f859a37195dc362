"""Read the messages and the tools of a row, in the forms that data sets have them.

A message keeps all its keys: the template gets `tool_calls`, `reasoning_content` and the rest. What is read
here: OpenAI's `role` and `content`, ShareGPT's `from` and `value`, `role` and `text`; lists, JSON and Python
literals.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from trainers.config.field_types import read_variables
from trainers.config.json_text import parse_json
from trainers.data.samples import RowError

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")  # roles whose text is a call
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# What an assistant's message may have instead of content.
INSTEAD = ("tool_calls", "function_call", *REASONING_KEYS)
CONTROLS = ("weight", "train")  # keys that say whether the loss sees a message: OpenAI's and Axolotl's

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")

Message = dict[str, Any]
Turns = list[Message]


@dataclass
class Chat:
    """A conversation, as the template gets it, and which of its messages the loss may see."""

    messages: Turns
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # more variables of the template
    ignored: frozenset[int] = frozenset()  # messages that the row takes out of the loss

    def until(self, end: int) -> Chat:
        """Return the first messages."""
        return Chat(self.messages[:end], self.tools, self.options, self.ignored)

    def after(self, message: Message) -> Chat:
        """Return the conversation with one more message in front."""
        ignored = frozenset(number + 1 for number in self.ignored)
        return Chat([message, *self.messages], self.tools, self.options, ignored)


def has_substance(message: Message) -> bool:
    """Return whether a message says something: text, a call, or reasoning."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        return True
    return bool(content and not isinstance(content, str)) or any(message.get(key) for key in INSTEAD)


def looks_like_messages(value: Any) -> bool:
    """Return whether a value is a list of messages, or the text of one (CSV files contain both)."""
    if isinstance(value, str):
        value = parse_list(value)
    return (
        isinstance(value, list)
        and all(isinstance(turn, dict) for turn in value)
        and any("role" in turn or "from" in turn for turn in value)
    )


def parse_list(text: str) -> Any:
    """Return the list that a text contains as JSON or as a Python literal, or None."""
    text = text.strip()
    if not text.startswith("["):
        return None
    for parse in (parse_json, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def is_dialogue(value: Any) -> bool:
    """Return whether a value is text with the turns of Human and Assistant, as in HH-RLHF."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def read_dialogue(text: str) -> Turns:
    """Return the turns of Human and Assistant in a text.

    Raises:
        RowError: it does not begin with one of them.
    """
    before, *parts = _SPEAKER.split(f"\n\n{text.strip()}")
    if before.strip() or not parts:
        raise RowError(f"a dialogue must begin with 'Human:', not {short(text)}.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": said.strip()}
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def read_messages(value: Any) -> tuple[Turns, frozenset[int]]:
    """Return the messages of a column, and the numbers of those that the row takes out of the loss.

    Raises:
        RowError: the value is not a conversation.
    """
    if isinstance(value, str):
        text, value = value, parse_list(value)
        if value is None:
            raise RowError(f"messages must be a list as JSON, and this text is not: {short(text)}.")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"messages must be a list, not {short(value)}.")
    turns: Turns = []
    ignored = set()
    for turn in value:
        message = _message(turn)
        if not _trained(message):
            ignored.add(len(turns))
        turns.append({key: part for key, part in message.items() if key not in CONTROLS})
    if not turns:
        raise RowError("a conversation needs at least one message.")
    return turns, frozenset(ignored)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise _malformed(turn)
    if turn.keys() == {"role", "content"} and turn["role"] in ROLES and isinstance(turn["content"], str):
        return turn
    message = _given(turn)
    role = message.pop("role", None) or message.pop("from", None)
    message.pop("from", None)
    name = next((key for key in CONTENT_KEYS if key in message), None)
    content = message.pop(name) if name else None
    if not isinstance(role, str):
        raise _malformed(turn)
    given = role.strip().lower()
    known = _ROLE_NAMES.get(given, given)
    if known not in ROLES:
        raise RowError(f"there is no role '{role}'. Allowed: {', '.join(ROLES)}.")
    if given in CALLS:
        return {"role": known, "content": "", "tool_calls": read_calls(content), **message}
    if "function_call" in message:  # OpenAI's first form of a call
        message["tool_calls"] = read_calls([message.pop("function_call")])
    if "tool_calls" in message:
        message["tool_calls"] = read_calls(message["tool_calls"])
        if not message["tool_calls"]:
            del message["tool_calls"]
    if content is None and known == "assistant" and any(key in message for key in INSTEAD):
        return {"role": known, **message}
    if not (isinstance(content, str) or (known == "tool" and isinstance(content, dict)) or _parts(content)):
        raise _malformed(turn)
    return {"role": known, "content": content, **message}


def _parts(content: Any) -> bool:
    """Return whether the content is a list of texts, as for models that see images.

    Raises:
        RowError: a part is an image or the like, which no trainer takes.
    """
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return False
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"a part of a message must be text, not {part.get('type', short(part))}.")
    return bool(content)


def _malformed(turn: Any) -> RowError:
    return RowError(f'a message must be {{"role": "...", "content": "..."}} (both text), not {short(turn)}.')


def _trained(message: Message) -> bool:
    """Return whether the loss may see a message.

    Raises:
        RowError: its weight is neither 0 nor 1.
    """
    weight, train = message.get("weight", 1), message.get("train", True)
    if weight not in (0, 1):
        raise RowError(f"the weight of a message must be 0 or 1, not {weight}.")
    if not isinstance(train, bool):
        raise RowError(f"train of a message must be true or false, not {short(train)}.")
    return bool(weight) and train


def read_calls(value: Any) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's form, with the arguments as they are: an object, or text.

    Raises:
        RowError: a call has no name, or is no object.
    """
    if isinstance(value, str):
        value = _json(value, "a tool call")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f'a tool call must be {{"name": "...", "arguments": ...}}, not {short(call)}.')
        arguments = function.get("arguments", function.get("parameters", {}))
        empty = arguments is None or (isinstance(arguments, str) and not arguments.strip())
        function = {**function, "arguments": {} if empty else arguments}
        outer = {key: part for key, part in call.items() if key != "function"} if "function" in call else {}
        calls.append({"type": "function", **outer, "function": function})
    return calls


def object_or_text(text: str) -> Any:
    """Return the object that a text contains as JSON, or the text."""
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a row: a list of objects, JSON of it, or a list of JSON texts; None if it has none.

    Raises:
        RowError: the value is something else.
    """
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        value = _json(value, "tools")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"tools must be a list of objects, not {short(value)}.")
    tools = [_json(tool, "a tool") if isinstance(tool, str) else tool for tool in value]
    for tool in tools:
        if not isinstance(tool, dict):
            raise RowError(f"tools must be a list of objects, not {short(tool)}.")
    return tools or None


def read_options(value: Any) -> dict[str, Any]:
    """Return the variables that a row gives to the template.

    Raises:
        RowError: they are no object.
    """
    if value is None or value == "":
        return {}
    try:
        value = read_variables(value)
    except ValueError as error:
        raise RowError(f"chat_template_kwargs: {error}.") from error
    if not isinstance(value, dict):
        raise RowError(f"chat_template_kwargs must be an object, not {short(value)}.")
    return {str(key): part for key, part in value.items() if part is not None}


def _json(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RowError(f"{what} must be JSON, not {short(text)} ({error}).") from error


def _given(turn: Message) -> Message:
    """Return a message without the keys of it, of its calls and of its parts that are null.

    Templates ask whether a key is there. What is null in the arguments of a call, or in what a tool returned,
    is data.
    """
    message = {key: part for key, part in turn.items() if part is not None}
    for name in ("tool_calls", "content"):
        if isinstance(message.get(name), list):
            message[name] = [_without_nulls(part) for part in message[name]]
    return message


def _without_nulls(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    found = {key: value for key, value in part.items() if value is not None}
    return found | {"function": _without_nulls(found["function"])} if "function" in found else found


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
