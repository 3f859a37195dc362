"""Values as text, for messages: counts, sizes, the first line of an error."""

from __future__ import annotations

# Control characters, and those that change the direction of a text -> how they are written.
_OBEYED = {
    sign: f"\\x{sign:02x}" if sign < 256 else f"\\u{sign:04x}"
    for signs in (range(32), range(127, 160), range(0x202A, 0x202F), range(0x2066, 0x206A))
    for sign in signs
}


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: `1 rank`, `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_bytes(size: int) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str, allowed: str = "\n\t") -> str:
    r"""Return a text without what a terminal or a page would obey: such characters are written as \x1b.

    They are control characters, and those that change the direction of the text. `allowed` stay as they are.
    """
    return text.translate({sign: word for sign, word in _OBEYED.items() if chr(sign) not in allowed})
