"""Bytes: of what a parameter takes, and in words."""

FLOAT32_BYTES = 4  # a weight, or its gradient
ADAM_BYTES = 2 * FLOAT32_BYTES  # the two moments of a trained parameter


def in_words(size: int) -> str:
    """Return a number of bytes as GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
