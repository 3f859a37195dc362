"""The types of config fields: how the text of a flag, or a YAML value, becomes the value of a field."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trainers.config.json_text import parse_json


def read_none(value: Any) -> Any:
    """Return None for the words `none`, `null` and `no`: a flag has no other way to give null."""
    return None if isinstance(value, str) and value.strip().lower() in ("none", "null", "no", "") else value


def int_or_list(value: Any) -> Any:
    """Split a flag such as `1024` or `1024,512`, as AutoTrain's --block-size accepts it."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip("[]").split(",")]
        return parts[0] if len(parts) == 1 else parts
    return value


def no_bool(value: Any) -> Any:
    """Refuse true and false where a number is needed; pydantic would read them as 1 and 0.

    Raises:
        ValueError: the value is a bool.
    """
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def names(value: Any) -> Any:
    """Return a flag such as `sigmoid,sft` as a list; a single name stays a string."""
    if isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",")]
    return read_none(value)


def read_bool(value: Any) -> Any:
    """Return the flags `true` and `false` as bools, for a field that may also be a path."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def read_checkpointing(value: Any) -> Any:
    """Accept true and false, as in transformers' field of this name; YAML 1.1 reads a bare `no` as false."""
    return {"true": "full", "false": "none", "no": "none"}.get(str(value).lower(), value)


def read_strategy(value: Any) -> Any:
    """Return `no` for false, which is how YAML 1.1 reads a bare `no`."""
    return "no" if value is False else value


# Variables of a chat template that are set for each conversation.
CONVERSATION = {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}


def read_variables(value: Any) -> Any:
    """Return the variables of a chat template; the text of a flag has them as JSON.

    Raises:
        ValueError: the text is no JSON, or a variable is set for each conversation.
    """
    value = read_none(value)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError('it must be an object, such as {"enable_thinking": false}') from error
    if isinstance(value, dict) and (taken := sorted(CONVERSATION & value.keys())):
        raise ValueError(f"{', '.join(taken)} is set for each conversation; remove it")
    return value


def read_sources(value: Any) -> Any:
    """Return the list of sources that the text of a flag has as JSON."""
    value = read_none(value)
    if isinstance(value, str):
        try:
            return parse_json(value)
        except ValueError as error:
            raise ValueError('it must be a list, such as [{"path": "data", "weight": 2}]') from error
    return value


def as_list(value: Any) -> Any:
    """Return a flag such as `assistant,tool` as a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


OptionalText = Annotated[str | None, BeforeValidator(read_none)]
Int = Annotated[int, BeforeValidator(no_bool)]
Float = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
TEMPLATE_FILE = ".jinja"  # how the path of a file with a chat template ends
NAMED_TEMPLATES = ("default", "tool_use", "rag")  # transformers' names for several templates of a tokenizer
TemplateName = Annotated[str, Field(pattern=rf"{re.escape(TEMPLATE_FILE)}$|^({'|'.join(NAMED_TEMPLATES)})$")]
Strategy = Literal["no", "steps", "epoch"]
