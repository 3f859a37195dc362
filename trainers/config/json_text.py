"""Parse JSON that may be damaged. Every malformed text is one kind of error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(text: str | bytes, parse: Callable[[Any], Any] = json.loads) -> Any:
    """Return the value of a JSON text, as `parse` gives it.

    Raises:
        json.JSONDecodeError: it is not JSON, or lists and objects are nested deeper than Python can read.
        UnicodeDecodeError: bytes that are not UTF-8.
    """
    try:
        return parse(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
