"""The types of config fields: how a word from a flag or from YAML becomes a value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field


def none_word(value: Any) -> Any:
    """`none`, `null` and `no` as words (a flag has no other way to say null)."""
    return None if isinstance(value, str) and value.strip().lower() in ("none", "null", "no", "") else value


def int_or_list(value: Any) -> Any:
    """`1024` or `1024,512` from a flag, as AutoTrain's --block-size takes it."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip("[]").split(",")]
        return parts[0] if len(parts) == 1 else parts
    return value


def no_bool(value: Any) -> Any:
    """YAML's `true` is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def names(value: Any) -> Any:
    """`sigmoid,sft` from a flag as a list; one name alone stays a word."""
    if isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",")]
    return none_word(value)


def flag_word(value: Any) -> Any:
    """`true` and `false` from a flag, where the field may be a path as well."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def checkpointing_word(value: Any) -> Any:
    """transformers' field of this name is true or false; YAML 1.1 reads a bare `no` as false."""
    return {"true": "full", "false": "none", "no": "none"}.get(str(value).lower(), value)


def strategy_word(value: Any) -> Any:
    """Return `no` for YAML 1.1's reading of a bare `no`, which is false."""
    return "no" if value is False else value


Word = Annotated[str | None, BeforeValidator(none_word)]
Int = Annotated[int, BeforeValidator(no_bool)]
Float = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
Strategy = Literal["no", "steps", "epoch"]
